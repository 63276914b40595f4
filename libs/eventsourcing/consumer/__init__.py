"""Follows topics of the event log: ``consumer.py`` has the loop, the other files have one part each."""

from libs.eventsourcing.consumer.consumer import Consumer

__all__ = ["Consumer"]
