"""Leases that expire by the server's clock, so the clocks of the instances don't matter.

A lease usually keeps two instances from doing the same work, but it guarantees nothing: a process that was paused until
its lease expired may still finish a step. So whatever is done under a lease is also checked where it is written.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog

from libs.core.ids import uuid7
from libs.mongodb.client import Collection, Document, DuplicateKeyError, PyMongoError, in_short

LEASE_SECONDS = 5.0

log = structlog.get_logger(__name__)


class Leases:
    """The leases of one service.

    Args:
        collection: one document a lease: ``_id``, ``holder``, ``expires_at``.
        lease_seconds: how long after its last renewal a lease expires.
        holder: this instance's name. It holds the leases that its previous process held; by default the name is new.
    """

    def __init__(self, collection: Collection, lease_seconds: float = LEASE_SECONDS, *, holder: str = "") -> None:
        self._collection = collection
        self._lease_seconds = lease_seconds
        self.holder = holder or uuid7()
        self._is_store_unavailable = False

    async def acquire(self, name: str) -> bool:
        """Take or renew the lease; False while another instance holds it."""
        criteria: Document = {
            "_id": name,
            "$or": [
                {"holder": self.holder},
                {"$expr": {"$lte": ["$expires_at", "$$NOW"]}},
                # No lease lasts that long, so the server's clock was set back.
                {"$expr": {"$gt": ["$expires_at", {"$add": ["$$NOW", int(self._lease_seconds * 10_000)]}]}},
            ],
        }
        expiry = {"$add": ["$$NOW", int(self._lease_seconds * 1000)]}
        change = [{"$set": {"holder": self.holder, "expires_at": expiry}}]
        result = await self._collection.update_one(criteria, change)
        if result.matched_count:
            return True
        try:
            # An upsert must not contain $expr. The first instance to insert the document holds the lease.
            await self._collection.insert_one({"_id": name, "holder": self.holder})
        except DuplicateKeyError:
            return False
        return bool((await self._collection.update_one({"_id": name, "holder": self.holder}, change)).matched_count)

    async def release(self, name: str) -> None:
        """Release the lease, so that another instance need not wait until it expires."""
        await self._collection.update_one(
            {"_id": name, "holder": self.holder}, [{"$set": {"expires_at": "$$NOW", "holder": ""}}]
        )

    async def run_while_leader(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Wait for the lease, run ``work`` while it is held, and start over when it is lost; until cancelled.

        ``work`` is cancelled when the lease is lost or can't be renewed in time. Its exceptions are raised after the
        lease was released.
        """
        while True:
            try:
                await self._acquired(name)
                log.debug("lease_acquired", lease=name)
                await self._lead(name, work)
            finally:
                # Also if acquiring it was cancelled, because the server may have granted it already.
                await self._try_release(name)
            log.info("lease_lost", lease=name)

    async def _acquired(self, name: str) -> None:
        while not await self._try_acquire(name):  # noqa: ASYNC110 - another process releases it
            await asyncio.sleep(self._lease_seconds / 3)

    async def _lead(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.ensure_future(work())
        held_until = time.monotonic() + self._lease_seconds
        try:
            while True:
                done, _ = await asyncio.wait({task}, timeout=self._lease_seconds / 3)
                if done:
                    return task.result()
                renewed_at = time.monotonic()
                if await self._try_acquire(name):
                    held_until = renewed_at + self._lease_seconds
                elif time.monotonic() >= held_until - self._lease_seconds / 3:
                    break
        finally:
            task.cancel()
            # If this is being cancelled, nobody else retrieves the task's error, and the event loop would report that.
            await asyncio.gather(task, return_exceptions=True)
        # The work may have failed while the lease was being renewed.
        return None if task.cancelled() else task.result()

    async def _try_acquire(self, name: str) -> bool:
        try:
            acquired = await self.acquire(name)
        except PyMongoError as error:
            self._note_outage(name, error)
            return False
        self._is_store_unavailable = False
        return acquired

    async def _try_release(self, name: str) -> None:
        try:
            await self.release(name)
        except PyMongoError as error:
            self._note_outage(name, error)

    def _note_outage(self, name: str, error: PyMongoError) -> None:
        """One warning for each outage, whatever the number of leases."""
        report = log.debug if self._is_store_unavailable else log.warning
        report("lease_store_unavailable", lease=name, error=in_short(error))
        self._is_store_unavailable = True
