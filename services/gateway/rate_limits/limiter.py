"""Admits or refuses requests: leases permits when they are needed, and gives back those that are not."""

import asyncio
import time
from collections.abc import Awaitable
from contextlib import suppress
from typing import TypeVar

import structlog

from libs.core.ids import uuid7
from libs.mongodb.client import Database, PyMongoError
from libs.process.telemetry import RATE_LIMITS_LOCAL
from services.gateway.rate_limits.counters import Counters
from services.gateway.rate_limits.permits import Account, Policy, Verdict
from services.gateway.rate_limits.presence import Presence

STORE_TIMEOUT_SECONDS = 2.0
LEAVE_TIMEOUT_SECONDS = 1.0
ANNOUNCE_SECONDS = 2.0
TICK_SECONDS = 0.5
ACCOUNTS_MAX = 100_000
GIVEN_BACK_MAX = 1000

T = TypeVar("T")

log = structlog.get_logger(__name__)


class RateLimiter:
    """The limits of one gateway, kept together with the others on the same database.

    Args:
        database: the gateways' own.
        instance: this gateway's name, under which it replaces one that died; a new one if empty.
    """

    def __init__(self, database: Database, instance: str = "") -> None:
        self._counters = Counters(database["rate_limits"])
        self._presence = Presence(database["gateways"], instance or uuid7())
        self._subjects: dict[tuple[str, str], _Subject] = {}
        self._is_away = False
        self._is_open = False
        self._server_ahead_ms = time.time() * 1000 - _clock_ms()

    async def open(self) -> None:
        """Announce this gateway before its first request; without MongoDB it starts with local limits."""
        await self._announce()

    async def close(self) -> None:
        """Give back everything and leave, if MongoDB can be reached."""
        with suppress(PyMongoError, TimeoutError):
            async with asyncio.timeout(LEAVE_TIMEOUT_SECONDS):
                if not self._is_away:
                    await self._give_back([subject for subject in self._subjects.values() if subject.account.owes])
                    await self._presence.leave()

    async def run(self) -> None:
        """Announce this gateway and give back what is idle, until cancelled."""
        announce_at = time.monotonic() + ANNOUNCE_SECONDS
        while True:
            await asyncio.sleep(TICK_SECONDS)
            if self._is_away or time.monotonic() >= announce_at:
                await self._announce()
                announce_at = time.monotonic() + ANNOUNCE_SECONDS
            await self._tidy()

    async def admit(self, policy: Policy, name: str) -> Verdict:
        """Decide about one request of the subject with this name."""
        subject = self._subjects.get((policy.name, name))
        if subject is None:
            subject = self._opened(policy, name)
        # The limit may have changed; it applies from the next lease on.
        subject.account.policy = policy
        return subject.account.take(_clock_ms()) or await self._renew(subject)

    def known_refusal(self, policy: Policy, name: str) -> Verdict | None:
        """The refusal if it is certain without a request to MongoDB; nothing is counted."""
        subject = self._subjects.get((policy.name, name))
        return None if subject is None else subject.account.refusal(_clock_ms())

    def _opened(self, policy: Policy, name: str) -> "_Subject":
        if len(self._subjects) >= ACCOUNTS_MAX:
            self._forget_oldest()
        subject = self._subjects[policy.name, name] = _Subject(policy, name)
        return subject

    def _forget_oldest(self) -> None:
        """Unless the counter has still to hear of it, which takes a second while MongoDB can be reached."""
        key, subject = next(iter(self._subjects.items()))
        if not subject.leasing.locked() and (self._is_away or not subject.account.owes):
            del self._subjects[key]

    async def _renew(self, subject: "_Subject") -> Verdict:
        """Decide by a new lease; concurrent requests of one subject share it."""
        account = subject.account
        async with subject.leasing:
            verdict = account.take(_clock_ms())
            if verdict is None and not self._is_away:
                verdict = await self._lease(subject)
            if verdict is None:
                verdict = account.take_unleased(_clock_ms() + self._server_ahead_ms, self._presence.gateways)
            return verdict

    async def _lease(self, subject: "_Subject") -> Verdict | None:
        """Decide by a new lease; None if MongoDB can't be reached."""
        account, requested_ms = subject.account, _clock_ms()
        try:
            lease = await _in_time(self._counters.lease(account.policy, subject.name, account.request()))
        except (PyMongoError, TimeoutError) as error:
            self._went_away(error)
            return None
        self._server_ahead_ms = lease.now_ms - _clock_ms()
        return account.accept(lease, requested_ms)

    async def _announce(self) -> None:
        try:
            if not self._is_open:
                await _in_time(self._counters.open())
                await _in_time(self._presence.open())
                self._is_open = True
            await _in_time(self._presence.announce())
        except (PyMongoError, TimeoutError) as error:
            self._went_away(error)
            return
        if self._is_away:
            log.info("rate_limits_shared")
        self._is_away = False
        RATE_LIMITS_LOCAL.set(0)

    def _went_away(self, error: Exception) -> None:
        if not self._is_away:
            log.warning("rate_limits_local", error=type(error).__name__)
        self._is_away = True
        RATE_LIMITS_LOCAL.set(1)

    async def _tidy(self) -> None:
        """Give back what ended leases have left, and forget the subjects that have nothing any more."""
        now_ms = _clock_ms()
        idle = [item for item in self._subjects.values() if item.account.is_idle(now_ms) and not item.leasing.locked()]
        owing = []
        for subject in idle:
            if subject.account.is_over(now_ms + self._server_ahead_ms):
                del self._subjects[subject.account.policy.name, subject.name]
            elif not self._is_away:
                if subject.account.owes:
                    owing.append(subject)
                else:
                    del self._subjects[subject.account.policy.name, subject.name]
        try:
            await _in_time(self._give_back(owing))
        except (PyMongoError, TimeoutError) as error:
            self._went_away(error)

    async def _give_back(self, owing: "list[_Subject]") -> None:
        requests = [
            (subject.account.policy, subject.name, subject.account.request(wants_permits=False)) for subject in owing
        ]
        for begin in range(0, len(requests), GIVEN_BACK_MAX):
            await self._counters.give_back(requests[begin : begin + GIVEN_BACK_MAX])


class _Subject:
    """Whose requests are counted under one policy."""

    __slots__ = ("account", "leasing", "name")

    def __init__(self, policy: Policy, name: str) -> None:
        self.account = Account(policy)
        self.name = name
        self.leasing = asyncio.Lock()


def _clock_ms() -> float:
    return time.monotonic() * 1000


async def _in_time(work: Awaitable[T]) -> T:
    async with asyncio.timeout(STORE_TIMEOUT_SECONDS):
        return await work
