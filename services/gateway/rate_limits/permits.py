"""The arithmetic of rate limits at one gateway: the permits of a lease are spent until it ends."""

import math
from dataclasses import dataclass

LEASE_MS = 1000
DRIFT = 0.001
"""How much faster than ours MongoDB's clock may run; quartz is a hundred times better."""


@dataclass(frozen=True, slots=True)
class Policy:
    """``limit`` requests in each window of ``period_seconds``; clients and counters know it by its name."""

    name: str
    limit: int
    period_seconds: int

    @property
    def period_ms(self) -> int:
        return self.period_seconds * 1000


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """What a gateway sends to the shared counter.

    Args:
        window_ms: the window of ``unused`` and ``unleased``, by its start; both are ignored in any other window.
        unused: permits of the last lease that were not spent.
        unleased: requests that were admitted without a permit while the counter could not be reached.
        wants_permits: False only reports.
    """

    window_ms: int
    unused: int
    unleased: int = 0
    wants_permits: bool = True


@dataclass(frozen=True, slots=True)
class Lease:
    """What the shared counter grants.

    Args:
        now_ms: MongoDB's clock.
        window_ms: the window that the permits are for, by its start.
        permits: 0 if the limit is reached.
        left: permits that nobody has leased.
    """

    now_ms: int
    window_ms: int
    permits: int
    left: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one request is admitted, and what its client is told.

    Args:
        reset_seconds: when the window ends, since the epoch.
        resets_in_seconds: the same, from now.
        is_local: decided without the shared counter.
    """

    admitted: bool
    remaining: int
    reset_seconds: int
    resets_in_seconds: int
    is_local: bool = False


class Account:
    """One subject's permits at this gateway under one policy.

    ``clock_ms`` is this process's monotonic clock; every other time is MongoDB's.
    """

    __slots__ = (
        "_held",
        "_lease_ends_ms",
        "_left",
        "_now_ms",
        "_requested_ms",
        "_spent",
        "_unleased",
        "_window_ms",
        "policy",
    )

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._now_ms = 0
        self._requested_ms = 0.0
        self._enter(-1)

    def _enter(self, window_ms: int) -> None:
        self._window_ms = window_ms
        self._held = self._left = self._spent = self._unleased = 0
        self._lease_ends_ms = 0

    def take(self, clock_ms: float) -> Verdict | None:
        """Decide about a request by the current lease; None if a new one is needed."""
        now_ms = self._latest_ms(clock_ms)
        if now_ms >= self._lease_ends_ms or (self._held == 0 and self._left > 0):
            return None
        return self._spend(now_ms)

    def refusal(self, clock_ms: float) -> Verdict | None:
        """The refusal of a request if the current lease decides it."""
        return None if self._held > 0 else self.take(clock_ms)

    def request(self, *, wants_permits: bool = True) -> LeaseRequest:
        """End the lease and exchange what is left of it.

        It is dropped here before it is sent, so that it is counted once at most if the request is lost or late.
        """
        request = LeaseRequest(self._window_ms, self._held, self._unleased, wants_permits)
        self._held = self._unleased = self._lease_ends_ms = 0
        return request

    def accept(self, lease: Lease, requested_ms: float) -> Verdict:
        """Start a lease that was requested at ``requested_ms`` of our clock.

        The request that needed it is decided as of the moment when the lease was granted, however long the reply took.
        """
        if lease.window_ms != self._window_ms:
            self._enter(lease.window_ms)
        self._now_ms, self._requested_ms = lease.now_ms, requested_ms
        self._held, self._left = lease.permits, lease.left
        self._lease_ends_ms = min(lease.now_ms + LEASE_MS, self._window_end_ms)
        return self._spend(lease.now_ms)

    def take_unleased(self, now_ms: float, gateways: int) -> Verdict:
        """Decide without the counter by this gateway's part of the limit, which is at least 1.

        Args:
            now_ms: the best guess at MongoDB's clock.
        """
        window_ms = int(now_ms) - int(now_ms) % self.policy.period_ms
        if window_ms > self._window_ms:
            self._enter(window_ms)
        part = max(1, self.policy.limit // gateways)
        admitted = self._spent < part
        self._spent += admitted
        self._unleased += admitted
        return self._verdict(admitted, max(0, part - self._spent), now_ms, is_local=True)

    @property
    def owes(self) -> bool:
        """There is something that the counter should know."""
        return self._held > 0 or self._unleased > 0

    def is_idle(self, clock_ms: float) -> bool:
        """The lease has ended, and no request has renewed it."""
        return self._latest_ms(clock_ms) >= self._lease_ends_ms

    def is_over(self, now_ms: float) -> bool:
        """The window has ended."""
        return now_ms >= self._window_end_ms

    @property
    def _window_end_ms(self) -> int:
        return self._window_ms + self.policy.period_ms

    def _latest_ms(self, clock_ms: float) -> float:
        """How late it can be at most: the lease was granted after it was requested."""
        return self._now_ms + (clock_ms - self._requested_ms) * (1 + DRIFT) + 1

    def _spend(self, now_ms: float) -> Verdict:
        admitted = self._held > 0
        self._held -= admitted
        self._spent += admitted
        return self._verdict(admitted, self._held + self._left, now_ms)

    def _verdict(self, admitted: bool, remaining: int, now_ms: float, *, is_local: bool = False) -> Verdict:
        end_ms = self._window_end_ms
        resets_in_seconds = max(1, math.ceil((end_ms - now_ms) / 1000))
        return Verdict(admitted, remaining, end_ms // 1000, resets_in_seconds, is_local)
