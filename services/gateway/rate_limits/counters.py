"""The shared counters: one document for each policy and subject, changed by one atomic update for each lease."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from libs.mongodb.client import Collection, Document, IndexModel, ReturnDocument, UpdateOne
from services.gateway.rate_limits.permits import Lease, LeaseRequest, Policy

LEASED_PART = 16
"""A lease is this part of what is left: few round trips for a busy subject, few permits idle where others need them."""
KEPT_MS = int(timedelta(minutes=10).total_seconds() * 1000)

Expression = Any


class Counters:
    """The counters of an installation."""

    def __init__(self, collection: Collection) -> None:
        self._collection = collection

    async def open(self) -> None:
        """Have MongoDB remove counters whose window ended some time ago."""
        await self._collection.create_indexes([IndexModel("expires_at", expireAfterSeconds=0)])

    async def lease(self, policy: Policy, subject: str, request: LeaseRequest) -> Lease:
        """Exchange what is left of the last lease for a new one."""
        counter = await self._collection.find_one_and_update(
            _key(policy, subject), update_of(policy, request), upsert=True, return_document=ReturnDocument.AFTER
        )
        return lease_of(policy, counter)

    async def give_back(self, items: Sequence[tuple[Policy, str, LeaseRequest]]) -> None:
        """Return what many subjects' leases have left."""
        updates = [
            UpdateOne(_key(policy, subject), update_of(policy, request), upsert=True)
            for policy, subject, request in items
        ]
        await self._collection.bulk_write(updates, ordered=False)


def _key(policy: Policy, subject: str) -> Document:
    return {"_id": {"policy": policy.name, "period_seconds": policy.period_seconds, "subject": subject}}


def lease_of(policy: Policy, counter: Document) -> Lease:
    """The lease that the update has just granted."""
    left = max(0, policy.limit - counter["taken"])
    return Lease(counter["now_ms"], counter["window_ms"], permits=counter["granted"], left=left)


def update_of(policy: Policy, request: LeaseRequest, now: Expression = "$$NOW") -> list[Document]:
    """The update pipeline of a lease: enter the current window, take back what was not spent, grant a new lease."""
    # The clock of a newly elected primary may be behind; a window that has begun is not left again.
    now_ms = {"$max": [{"$toLong": now}, {"$ifNull": ["$window_ms", 0]}]}
    window_ms = {"$subtract": ["$now_ms", {"$mod": ["$now_ms", policy.period_ms]}]}
    taken_before = {"$cond": [{"$eq": ["$window_ms", window_ms]}, "$taken", 0]}
    change = {"$cond": [{"$eq": ["$window_ms", request.window_ms]}, request.unleased - request.unused, 0]}
    left = {"$subtract": [policy.limit, "$taken"]}
    block = {"$max": [1, {"$toLong": {"$floor": {"$divide": [left, LEASED_PART]}}}]}
    granted = {"$max": [0, {"$min": [left, block]}]} if request.wants_permits else 0
    return [
        {"$set": {"now_ms": now_ms}},
        {"$set": {"window_ms": window_ms, "taken": taken_before}},
        {"$set": {"taken": {"$add": ["$taken", change]}}},
        {"$set": {"granted": granted}},
        {
            "$set": {
                "taken": {"$add": ["$taken", "$granted"]},
                "expires_at": {"$toDate": {"$add": ["$window_ms", policy.period_ms + KEPT_MS]}},
            }
        },
    ]
