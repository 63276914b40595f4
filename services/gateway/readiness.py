"""Whether the services behind can be used, which the gateway's own readiness depends on."""

import asyncio

import orjson
from multidict import CIMultiDict

from libs.process.health import Check, Degraded
from libs.web.principals import PRINCIPAL_HEADER, PrincipalSigner
from libs.web.upstream.exchange import ResponseTimeout
from libs.web.upstream.pool import ConnectFailed, ConnectionPool
from libs.web.upstream.wire import ResponseBroken, UpstreamRequest

TIMEOUT_SECONDS = 1.0
NO_ANSWER = (TimeoutError, ConnectFailed, ResponseBroken, ResponseTimeout)


async def fetched(
    pool: ConnectionPool, path: str, timeout_seconds: float, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    """The status and the body of a service's own answer; raises ``NO_ANSWER``."""
    request = UpstreamRequest("GET", path, CIMultiDict({"Host": pool.host} | (headers or {})), None)
    async with asyncio.timeout(timeout_seconds):
        return await pool.fetch(request)


def readiness_of(service: str, pool: ConnectionPool, principals: PrincipalSigner) -> Check:
    """Whether the service is ready and trusts this gateway's key."""

    async def check() -> str | None:
        headers = {PRINCIPAL_HEADER: principals.sign_as_service(service)}
        try:
            status, answer = await fetched(pool, "/readyz", TIMEOUT_SECONDS, headers)
        except NO_ANSWER as error:
            return f"the service does not answer: {type(error).__name__}"
        if status == 401:
            return "the service does not trust this gateway: its TRUSTED_KEYS do not match our SIGNING_KEY"
        return None if status == 200 else _failing_checks(answer)

    return check


def workers_by(pool: ConnectionPool) -> Check:
    """Degraded while the orchestrator knows no worker: only runs wait, as with workers scaled to zero."""

    async def check() -> str | None:
        try:
            _, answer = await fetched(pool, "/readyz", TIMEOUT_SECONDS)
            found = orjson.loads(answer).get("checks", {}).get("worker")
        except (*NO_ANSWER, ValueError):
            return Degraded("not known while job_orchestrator does not answer")
        return Degraded(found["message"]) if found and not found["ready"] else None

    return check


def _failing_checks(answer: bytes) -> str:
    try:
        checks = orjson.loads(answer)["checks"].items()
        return "not ready: " + "; ".join(f"{name}: {found['message']}" for name, found in checks if not found["ready"])
    except (ValueError, LookupError, TypeError, AttributeError):
        return "the service is not ready"
