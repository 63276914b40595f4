"""Catalog owns sources and destinations: what they are, their secrets, and which jobs use them.

It consumes ``datasync.jobs.v1`` (to show jobs beside what they use, and to confirm and release reservations) and emits
``datasync.catalog.v1``. Connections are tested and streams discovered by a worker, which it calls.
"""
