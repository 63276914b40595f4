"""Rebuilds of a service's documents from events: ``rebuild.py`` has the steps, the other files have one part each."""

from libs.eventsourcing.rebuild.rebuild import GRACE_SECONDS, Rebuild, TopicRepair
from libs.eventsourcing.rebuild.report import CollectionReport, RebuildFailed, RebuildReport

__all__ = ["GRACE_SECONDS", "CollectionReport", "Rebuild", "RebuildFailed", "RebuildReport", "TopicRepair"]
