"""Throttling of logins: after some consecutive failures, each attempt has to wait twice as long as the previous one.

An attempt is counted before the password is looked at, in one atomic update, so that a thousand attempts at the same
moment get no further than one after another would. A success takes its count back.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import orjson
from pymongo import ReturnDocument

from libs.core.clock import Clock
from libs.core.errors import RateLimited
from libs.mongodb.client import Collection, Document, DuplicateKeyError

FORGET_AFTER_SECONDS = 3600
DOUBLINGS_MAX = 30


@dataclass(frozen=True, slots=True)
class Policy:
    """When attempts have to wait, and for how long.

    Args:
        free_attempts: failures in a row that cost nothing.
        delay_seconds_first: the wait after the next one; it doubles from there up to ``delay_seconds_max``.
    """

    free_attempts: int
    delay_seconds_first: float
    delay_seconds_max: float


class LoginThrottle:
    """Counts failures of one kind (per account, or per address) in a collection with a TTL on ``expires_at``.

    A subject is one value or several, such as an account and an address.

    Args:
        policy: None admits every attempt.
    """

    def __init__(self, collection: Collection, clock: Clock, kind: str, policy: Policy | None) -> None:
        self._collection = collection
        self._clock = clock
        self._kind = kind
        self._policy = policy

    async def admit(self, *subject: str | int) -> None:
        """Count an attempt; raises ``RateLimited`` while the subject has to wait."""
        if self._policy is None:
            return
        now = self._clock.now()
        counted = await self._count(self._key(subject), self._update(self._policy, now))
        if not counted["admitted"]:
            wait_seconds = max((counted["blocked_until"] - now).total_seconds(), 0.001)
            raise RateLimited(
                f"too many failed logins; try again in {math.ceil(wait_seconds)} s",
                code="login_throttled",
                retry_after_seconds=wait_seconds,
            )

    async def forget(self, *subject: str | int) -> None:
        """A success: the count starts anew."""
        await self._collection.delete_one({"_id": self._key(subject)})

    async def take_back(self, *subject: str | int) -> None:
        """Take back one attempt, because it succeeded."""
        await self._collection.update_one(
            {"_id": self._key(subject), "failures": {"$gt": 0}},
            {"$inc": {"failures": -1}, "$set": {"blocked_until": self._clock.now()}},
        )

    async def _count(self, key: str, update: list[dict[str, Any]]) -> Document:
        for _ in range(3):
            try:
                counted = await self._collection.find_one_and_update(
                    {"_id": key}, update, upsert=True, return_document=ReturnDocument.AFTER
                )
            except DuplicateKeyError:
                # Two first attempts at once: one inserted, the other now finds what it made.
                continue
            assert counted is not None
            return counted
        raise RateLimited("too many logins at once; try again in a second", retry_after_seconds=1)

    def _update(self, policy: Policy, now: datetime) -> list[dict[str, Any]]:
        never = now - timedelta(days=1)
        expired = {"$lte": [{"$ifNull": ["$expires_at", never]}, now]}
        over = {"$min": [{"$subtract": ["$failures", policy.free_attempts]}, DOUBLINGS_MAX]}
        delay_ms = {
            "$min": [
                {"$multiply": [policy.delay_seconds_first * 1000, {"$pow": [2, {"$subtract": [over, 1]}]}]},
                policy.delay_seconds_max * 1000,
            ]
        }
        blocked_until = {"$cond": [{"$gt": [over, 0]}, {"$add": [now, {"$toLong": delay_ms}]}, now]}
        forgotten = now + timedelta(seconds=FORGET_AFTER_SECONDS + policy.delay_seconds_max)
        return [
            {
                "$set": {
                    "failures": {"$cond": [expired, 0, {"$ifNull": ["$failures", 0]}]},
                    "admitted": {"$lte": [{"$ifNull": ["$blocked_until", never]}, now]},
                }
            },
            {"$set": {"failures": {"$cond": ["$admitted", {"$add": ["$failures", 1]}, "$failures"]}}},
            {
                "$set": {
                    "blocked_until": {"$cond": ["$admitted", blocked_until, "$blocked_until"]},
                    "expires_at": {"$cond": ["$admitted", forgotten, "$expires_at"]},
                }
            },
        ]

    def _key(self, subject: Sequence[str | int]) -> str:
        """Hashed: people type passwords into the wrong field, and a name may be of any length."""
        return f"{self._kind}/{hashlib.sha256(orjson.dumps(subject)).hexdigest()}"
