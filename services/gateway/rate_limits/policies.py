"""Which limit a request falls under, and what clients are told about it."""

from libs.core.errors import RateLimited
from libs.core.principal import Principal
from libs.process.live import Live
from libs.process.telemetry import RATE_LIMITED
from libs.web.errors import family_of
from services.gateway.config import GatewaySettings
from services.gateway.rate_limits.permits import Policy, Verdict


class Policies:
    """The policies of an installation; None in place of those that are turned off."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._read_limits()
        for limit in (
            settings.rate_limit_address_per_minute,
            settings.rate_limit_sync_per_minute,
            settings.rate_limit_project_per_minute,
            settings.rate_limit_v2_standard_per_hour,
            settings.rate_limit_v2_enterprise_per_hour,
        ):
            limit.subscribe(lambda _: self._read_limits())

    def _read_limits(self) -> None:
        settings = self._settings

        def policy(name: str, limit: Live[int], period_seconds: int) -> Policy | None:
            is_on = settings.rate_limits and limit.value > 0
            return Policy(name, limit.value, period_seconds) if is_on else None

        self.address = policy("address", settings.rate_limit_address_per_minute, 60)
        self._sync = policy("sync", settings.rate_limit_sync_per_minute, 60)
        self._project = policy("project", settings.rate_limit_project_per_minute, 60)
        self._standard = policy("v2-standard", settings.rate_limit_v2_standard_per_hour, 3600)
        self._enterprise = policy("v2-enterprise", settings.rate_limit_v2_enterprise_per_hour, 3600)

    def of(self, path: str, principal: Principal) -> Policy | None:
        """The policy for a request of an authenticated caller."""
        match family_of(path):
            case "sync":
                return self._sync
            case "v2":
                return self._enterprise if principal.rate_class == "enterprise" else self._standard
            case _:
                return self._project


def headers_of(policy: Policy, verdict: Verdict) -> dict[str, str]:
    """The customary fields and those of draft-ietf-httpapi-ratelimit-headers-10."""
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
