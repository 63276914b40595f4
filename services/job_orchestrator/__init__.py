"""Jobs and their runs: what is replicated where and when, and how each run of it goes.

Owns the aggregates job and run. Consumes ``datasync.catalog.v1`` for the names and types of sources and destinations.
Emits ``datasync.jobs.v1`` and ``datasync.runs.v1``. Workers claim runs through its internal calls.
"""
