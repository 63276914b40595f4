"""Rate limits that hold exactly over several gateways, at about no cost a request.

A request is decided with permits that were leased from the shared counter; only when they, or the second that they are
good for, run out is the counter asked. Permits that lie idle go back. While the store can't be reached each gateway
admits its part of the limit by itself and says so: a limit that is not exact for a while is better than an outage.
"""

import asyncio
import time
from collections.abc import Awaitable
from contextlib import suppress
from typing import TypeVar

import structlog

from libs.core.errors import RateLimited
from libs.core.ids import uuid7
from libs.core.principal import Principal
from libs.mongodb.client import Database, PyMongoError
from libs.process.telemetry import RATE_LIMITED, RATE_LIMITS_LOCAL
from libs.web.errors import family_of
from services.gateway.config import GatewaySettings
from services.gateway.counters import Counters
from services.gateway.permits import SLOT_MS, Account, Policy, Verdict
from services.gateway.presence import Presence

ASK_TIMEOUT_SECONDS = 2.0
LEAVE_TIMEOUT_SECONDS = 1.0
ANNOUNCE_SECONDS = 2.0
TICK_SECONDS = 0.5
IDLE_MS = SLOT_MS
ACCOUNTS_MAX = 100_000
GIVEN_BACK_MAX = 1000

T = TypeVar("T")

log = structlog.get_logger(__name__)


class Policies:
    """Which limit a request falls under; None where that limit is turned off."""

    def __init__(self, settings: GatewaySettings) -> None:
        is_on = settings.rate_limits

        def policy(name: str, limit: int, period_seconds: int) -> Policy | None:
            return Policy(name, limit, period_seconds) if is_on and limit > 0 else None

        self.address = policy("address", settings.rate_limit_address_per_minute, 60)
        self._sync = policy("sync", settings.rate_limit_sync_per_minute, 60)
        self._project = policy("project", settings.rate_limit_project_per_minute, 60)
        self._standard = policy("v2-standard", settings.rate_limit_v2_standard_per_hour, 3600)
        self._enterprise = policy("v2-enterprise", settings.rate_limit_v2_enterprise_per_hour, 3600)

    def of(self, path: str, principal: Principal) -> Policy | None:
        """The policy for what an authenticated caller does."""
        match family_of(path):
            case "sync":
                return self._sync
            case "v2":
                return self._enterprise if principal.rate_class == "enterprise" else self._standard
            case _:
                return self._project


class RateLimits:
    """Admits or refuses requests.

    Args:
        database: the gateways' own.
        gateway: this process's name among the gateways, of letters and digits.
        instance: the name under which it takes the place of a gateway that has died; ``gateway`` when empty.
    """

    def __init__(self, database: Database, gateway: str | None = None, *, instance: str = "") -> None:
        holder = gateway or uuid7().replace("-", "")
        self._counters = Counters(database["rate_limits"], holder)
        self._presence = Presence(database["gateways"], instance or holder)
        self._accounts: dict[tuple[str, str], _Shared] = {}
        self._number = 0
        self._is_away = False
        self._is_open = False
        self._server_ahead_ms = time.time() * 1000 - _clock_ms()

    async def open(self) -> None:
        """Make this gateway known before its first request; without the store it begins with local limits."""
        await self._announce()

    async def close(self) -> None:
        """Give back everything and leave, as far as the store is there."""
        with suppress(PyMongoError, TimeoutError):
            async with asyncio.timeout(LEAVE_TIMEOUT_SECONDS):
                if not self._is_away:
                    await self._give_back([item for item in self._accounts.values() if item.account.owes])
                    await self._presence.leave()

    async def run(self) -> None:
        """Announce this gateway and give back what lies idle, until cancelled."""
        announce_at = time.monotonic() + ANNOUNCE_SECONDS
        while True:
            await asyncio.sleep(TICK_SECONDS)
            if self._is_away or time.monotonic() >= announce_at:
                await self._announce()
                announce_at = time.monotonic() + ANNOUNCE_SECONDS
            await self._tidy()

    async def admit(self, policy: Policy, subject: str) -> Verdict:
        """Decide about one request of a subject."""
        item = self._accounts.get((policy.name, subject))
        if item is None:
            item = self._opened(policy, subject)
        return item.account.take(_clock_ms()) or await self._decide(item)

    def knows_exhausted(self, policy: Policy, subject: str) -> Verdict | None:
        """The refusal, where it is known without asking; a request is not counted by that."""
        item = self._accounts.get((policy.name, subject))
        if item is None or item.account.held > 0:
            return None
        return item.account.take(_clock_ms())

    def _opened(self, policy: Policy, subject: str) -> "_Shared":
        if len(self._accounts) >= ACCOUNTS_MAX:
            self._forget_oldest()
        item = self._accounts[policy.name, subject] = _Shared(policy, subject)
        return item

    def _forget_oldest(self) -> None:
        """Only who owes nothing: the counter must hear of everything spent, and while it can it soon does."""
        key, item = next(iter(self._accounts.items()))
        if not item.asking.locked() and (self._is_away or not item.account.owes):
            del self._accounts[key]

    async def _decide(self, item: "_Shared") -> Verdict:
        """Ask the counter, or decide alone; those who wait for one subject's permits ask one after another."""
        account = item.account
        async with item.asking:
            while True:
                verdict = account.take(_clock_ms())
                if verdict is not None:
                    return verdict
                if not self._is_away:
                    wait_ms = await self._ask(item)
                    if wait_ms == 0:
                        return account.settle(_clock_ms())
                    if wait_ms is not None:
                        await asyncio.sleep(wait_ms / 1000)
                        continue
                now_ms = _clock_ms()
                return account.take_alone(now_ms, now_ms + self._server_ahead_ms, self._presence.gateways)

    async def _ask(self, item: "_Shared") -> int | None:
        """How long to wait, 0 when the counter has answered, None when it could not be asked."""
        asked_ms = _clock_ms()
        ask = item.account.ask(self._next_number(), alone=self._presence.is_alone)
        try:
            told = await _in_time(self._counters.ask(item.account.policy, item.subject, ask))
        except (PyMongoError, TimeoutError) as error:
            self._went_away(error)
            return None
        self._server_ahead_ms = told.now_ms - _clock_ms()
        return item.account.learn(told, asked_ms) or 0

    def _next_number(self) -> int:
        self._number += 1
        return self._number

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
        """Give back what was not used for a moment, and forget who did nothing since."""
        now_ms = _clock_ms()
        idle = [
            item
            for item in self._accounts.values()
            if now_ms - item.account.used_ms > IDLE_MS and not item.asking.locked()
        ]
        server_ms = now_ms + self._server_ahead_ms
        for item in idle:
            if not item.account.owes or item.account.is_over(server_ms):
                self._accounts.pop((item.account.policy.name, item.subject), None)
        owing = [item for item in idle if item.account.owes and not item.account.is_over(server_ms)]
        if owing and not self._is_away:
            try:
                await _in_time(self._give_back(owing))
            except (PyMongoError, TimeoutError) as error:
                self._went_away(error)

    async def _give_back(self, owing: "list[_Shared]") -> None:
        # All are asked before the first is sent: one that is in use again by then is overtaken by its newer ask.
        asks = [(item, item.account.give_back(self._next_number())) for item in owing]
        for begin in range(0, len(asks), GIVEN_BACK_MAX):
            part = asks[begin : begin + GIVEN_BACK_MAX]
            await self._counters.give_back([(item.account.policy, item.subject, ask) for item, ask in part])
            for item, ask in part:
                item.account.gave_back(ask)


class _Shared:
    """An account, and the lock of who asks the counter for it."""

    __slots__ = ("account", "asking", "subject")

    def __init__(self, policy: Policy, subject: str) -> None:
        self.account = Account(policy)
        self.subject = subject
        self.asking = asyncio.Lock()


def headers_of(policy: Policy, verdict: Verdict) -> dict[str, str]:
    """What a client is told: the customary fields and those of draft-ietf-httpapi-ratelimit-headers-10."""
    headers = {
        "X-RateLimit-Limit": str(policy.limit),
        "X-RateLimit-Remaining": str(verdict.remaining),
        "X-RateLimit-Reset": str(verdict.reset_seconds),
        "RateLimit-Policy": f'"{policy.name}";q={policy.limit};w={policy.period_seconds}',
        "RateLimit": f'"{policy.name}";r={verdict.remaining};t={verdict.resets_in_seconds}',
    }
    if verdict.is_local:
        headers["X-RateLimit-Mode"] = "local"
    return headers


def refusal_of(policy: Policy, verdict: Verdict) -> RateLimited:
    """The error of a request that is over the limit."""
    RATE_LIMITED.labels(policy.name).inc()
    period = "minute" if policy.period_seconds == 60 else "hour"
    return RateLimited(
        f"too many requests: {policy.limit} a {period} are allowed; the next window begins in "
        f"{verdict.resets_in_seconds} s",
        retry_after_seconds=verdict.resets_in_seconds,
    )


def _clock_ms() -> float:
    return time.monotonic() * 1000


async def _in_time(work: Awaitable[T]) -> T:
    async with asyncio.timeout(ASK_TIMEOUT_SECONDS):
        return await work
