"""Deletes documents of entities that ended long ago; their events stay.

How far it went is kept in the same database, so that a rebuild leaves out the same documents.
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
        field: the time that counts, such as ``state.finished_at``; a document without it is kept. It has an index.
        keep_seconds: for how long from that time on.
    """

    def __init__(self, documents: Documents, clock: Clock, *, collection: str, field: str, keep_seconds: float) -> None:
        self._documents = documents
        self._clock = clock
        self._collection = collection
        self._field = field
        self._keep_seconds = keep_seconds

    async def run(self) -> None:
        """Sweep every hour, until cancelled; under a lease."""
        while True:
            await self.sweep()
            await asyncio.sleep(ROUND_SECONDS)

    async def sweep(self) -> int:
        """Delete what is past its time; returns how many documents that were."""
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
    """Leave out of rebuilt collections what was forgotten from the live ones.

    Args:
        shadows: the rebuilt collections' names by their logical names.
    """
    async for kept in database[RETENTION].find({"_id": {"$in": list(shadows)}}):
        await database[shadows[kept["_id"]]].delete_many({kept["field"]: {"$lt": kept["before"]}})
