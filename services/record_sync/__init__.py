"""Record sync owns developer sync records: what developers' tools store about external resources, with its history.

It consumes nothing and emits ``datasync.records.v1``. A project's totals and pages come from counted lists, which the
batch that changes a record keeps (``libs/eventsourcing/counted_lists.py``).
"""
