"""The lease that allows one rebuild of a service at a time."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import NoReturn, TypeVar

import structlog

from libs.eventsourcing.event_store import EventStore
from libs.eventsourcing.rebuild.report import RebuildFailed
from libs.mongodb.client import ClientSession, PyMongoError
from libs.mongodb.leases import Leases

LEASE = "rebuild"
LEASE_SECONDS = 30.0
LOST = "the lease on rebuilds was lost, and another rebuild may have begun; run it again"

Result = TypeVar("Result")

log = structlog.get_logger(__name__)


class RebuildLease:
    """The lease of one rebuild."""

    def __init__(self, store: EventStore) -> None:
        self._leases = Leases(store.database["leases"], LEASE_SECONDS)
        self._documents = store.sync_database["leases"]

    async def hold(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Run ``work`` while the lease is held, and cancel it when the lease is lost.

        Raises:
            RebuildFailed: another rebuild holds the lease, or took it meanwhile.
        """
        if not await self._leases.acquire(LEASE):
            raise RebuildFailed("another rebuild of this service is running")
        working = asyncio.ensure_future(work())
        renewing = asyncio.create_task(self._renew(), name="rebuild-lease")
        try:
            await asyncio.wait({working, renewing}, return_when=asyncio.FIRST_COMPLETED)
            return await (working if working.done() else renewing)
        finally:
            for task in (working, renewing):
                task.cancel()
            # Retrieves their exceptions, which the event loop would otherwise report.
            await asyncio.gather(working, renewing, return_exceptions=True)
            await self._leases.release(LEASE)

    def require(self, session: ClientSession | None = None) -> None:
        """Renew the lease, or raise ``RebuildFailed``. Within a transaction nobody else can take it until the commit.

        The next holder drops this rebuild's collections, so without the lease nothing that was read from them counts.
        """
        renewed = self._documents.update_one(
            {"_id": LEASE, "holder": self._leases.holder},
            [{"$set": {"expires_at": {"$add": ["$$NOW", int(LEASE_SECONDS * 1000)]}}}],
            session=session,
        )
        if renewed.matched_count != 1:
            raise RebuildFailed(LOST)

    async def _renew(self) -> NoReturn:
        held_until = time.monotonic() + LEASE_SECONDS
        while True:
            await asyncio.sleep(LEASE_SECONDS / 6)
            requested_at = time.monotonic()
            try:
                if not await self._leases.acquire(LEASE):
                    raise RebuildFailed(LOST)
                held_until = requested_at + LEASE_SECONDS
            except PyMongoError as error:
                log.warning("lease_store_unavailable", lease=LEASE, error=type(error).__name__)
                if time.monotonic() >= held_until:
                    raise RebuildFailed(LOST) from error
