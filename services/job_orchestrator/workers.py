"""The known workers, by when each last asked for work."""

import asyncio
import time

from libs.core.clock import isoformat_z
from libs.eventsourcing.documents import Documents
from libs.mongodb.client import ASCENDING, DESCENDING, IndexModel, PyMongoError
from libs.process.health import Degraded
from services.job_orchestrator.claims import LEASES

WORKERS = "workers"
WORKERS_INDEXES = [IndexModel([("seen_at", ASCENDING)], expireAfterSeconds=7 * 24 * 3600)]
NOTED_SECONDS = 10.0
ABSENT_SECONDS = 90
CHECK_SECONDS_MAX = 2.0


class Workers:
    """Records which workers ask for work, and reports if none does."""

    def __init__(self, documents: Documents) -> None:
        self._workers = documents.plain(WORKERS)
        self._leases = documents.plain(LEASES)
        self._noted_at: dict[str, float] = {}

    async def note(self, worker_id: str) -> None:
        """Record that a worker asked for work, at most every ``NOTED_SECONDS``."""
        now = time.monotonic()
        if now - self._noted_at.get(worker_id, -NOTED_SECONDS) < NOTED_SECONDS:
            return
        self._noted_at = {other: at for other, at in self._noted_at.items() if now - at < NOTED_SECONDS}
        self._noted_at[worker_id] = now
        await self._workers.update_one({"_id": worker_id}, [{"$set": {"seen_at": "$$NOW"}}], upsert=True)

    async def absence(self) -> str | None:
        """``Degraded`` if no worker has asked for work recently and none executes any."""
        try:
            async with asyncio.timeout(CHECK_SECONDS_MAX):
                return await self._absence()
        except (PyMongoError, TimeoutError):
            return Degraded("unknown because MongoDB does not answer")

    async def _absence(self) -> str | None:
        lately = {"$expr": {"$gt": ["$seen_at", {"$subtract": ["$$NOW", ABSENT_SECONDS * 1000]}]}}
        is_leased = {"$expr": {"$gt": ["$expires_at", "$$NOW"]}}
        if await self._workers.find_one(lately) or await self._leases.find_one(is_leased):
            return None
        last = await self._workers.find_one({}, sort=[("seen_at", DESCENDING)])
        if last is None:
            return Degraded("no worker has ever asked for runs")
        return Degraded(f"no worker has asked for runs since {isoformat_z(last['seen_at'])}")
