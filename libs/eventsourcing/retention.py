"""Deletes the documents of entities that ended long ago; their events are kept.

What was deleted is recorded in the same database, so that a rebuild does not bring it back.
"""

import asyncio
from datetime import timedelta

import structlog

from libs.core.clock import Clock
from libs.eventsourcing.documents import Documents
from libs.mongodb.client import Database

RETENTION = "retention"
ROUND_SECONDS = 3600.0
DELETED_TOGETHER = 1_000

log = structlog.get_logger(__name__)


class Retention:
    """The retention of one collection of aggregates.

    Args:
        collection: its logical name.
        field: the time from which on a document is kept, such as ``state.finished_at``; it needs an index. Documents
            without it are never deleted.
        keep_seconds: for how long a document is kept.
    """

    def __init__(self, documents: Documents, clock: Clock, *, collection: str, field: str, keep_seconds: float) -> None:
        self._documents = documents
        self._clock = clock
        self._collection = collection
        self._field = field
        self._keep_seconds = keep_seconds

    async def run(self) -> None:
        """Delete expired documents every hour, until cancelled; run under a lease."""
        while True:
            await self.sweep()
            await asyncio.sleep(ROUND_SECONDS)

    async def sweep(self) -> int:
        """Delete the expired documents, and return how many there were."""
        before = self._clock.now() - timedelta(seconds=self._keep_seconds)
        expired = {self._field: {"$lt": before}}
        await self._documents.plain(RETENTION).update_one(
            {"_id": self._collection}, {"$set": {"field": self._field}, "$max": {"before": before}}, upsert=True
        )
        documents = self._documents.collection(self._collection)
        deleted = 0
        while ids := [item["_id"] async for item in documents.find(expired, {"_id": True}).limit(DELETED_TOGETHER)]:
            deleted += (await documents.delete_many({"_id": {"$in": ids}})).deleted_count
        if deleted:
            log.info("documents_forgotten", collection=self._collection, before=before.isoformat(), count=deleted)
        return deleted


async def forget_again(database: Database, shadows: dict[str, str]) -> None:
    """Delete from rebuilt collections what was deleted from the live ones.

    Args:
        shadows: the names of the rebuilt collections, by logical name.
    """
    async for kept in database[RETENTION].find({"_id": {"$in": list(shadows)}}):
        await database[shadows[kept["_id"]]].delete_many({kept["field"]: {"$lt": kept["before"]}})
