"""Metrics for autoscaling: how many runs wait for a worker, and for how long."""

import asyncio

from libs.core.clock import Clock
from libs.eventsourcing.documents import Documents
from libs.mongodb.client import ASCENDING
from libs.process.telemetry import OLDEST_WAIT_SECONDS, RUNS_ACTIVE, RUNS_WAITING
from services.job_orchestrator.domain.run import RUN

INTERVAL_SECONDS = 2.0


class Measurements:
    """Updates the gauges of runs, which are equal in every instance."""

    def __init__(self, documents: Documents, clock: Clock) -> None:
        self._documents = documents
        self._clock = clock

    async def run(self) -> None:
        """Measure periodically, until cancelled."""
        while True:
            await self.measure()
            await asyncio.sleep(INTERVAL_SECONDS)

    async def measure(self) -> None:
        """Count the runs. A run whose retry is not due yet is not waiting."""
        runs, now = self._documents.collection(RUN.collection), self._clock.now()
        due = {"state.status": "queued", "state.waiting_since": {"$lte": now}}
        RUNS_WAITING.set(await runs.count_documents(due))
        RUNS_ACTIVE.set(await runs.count_documents({"state.status": {"$in": ["queued", "running"]}}))
        # Only this field is read, since a run that cannot be parsed would stop the measurements.
        oldest = await runs.find_one(due, {"state.waiting_since": 1}, sort=[("state.waiting_since", ASCENDING)])
        OLDEST_WAIT_SECONDS.set((now - oldest["state"]["waiting_since"]).total_seconds() if oldest else 0)
