"""The shared counter of rate limits in plain Python, which its update pipeline is compared with."""

from dataclasses import dataclass

from services.gateway.rate_limits.counters import LEASED_PART
from services.gateway.rate_limits.permits import Lease, LeaseRequest, Policy


@dataclass
class Counter:
    """One policy and subject."""

    policy: Policy
    window_ms: int = 0
    taken: int = 0

    def lease(self, request: LeaseRequest, server_ms: int) -> Lease:
        """What MongoDB does at ``server_ms`` of its clock."""
        now_ms = max(server_ms, self.window_ms)
        window_ms = now_ms - now_ms % self.policy.period_ms
        if window_ms != self.window_ms:
            self.window_ms, self.taken = window_ms, 0
        if window_ms == request.window_ms:
            self.taken += request.unleased - request.unused
        left = max(0, self.policy.limit - self.taken)
        permits = min(left, max(1, left // LEASED_PART)) if request.wants_permits else 0
        self.taken += permits
        return Lease(now_ms, window_ms, permits, left - permits)
