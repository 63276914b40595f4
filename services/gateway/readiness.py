"""Whether the services behind can be used, which the gateway's own readiness depends on."""

import aiohttp
import orjson

from libs.process.health import Check, Degraded
from libs.web.principals import PRINCIPAL_HEADER, PrincipalSigner


def readiness_of(service: str, url: str, probes: aiohttp.ClientSession, principals: PrincipalSigner) -> Check:
    """Whether the service is ready and trusts this gateway's key."""

    async def check() -> str | None:
        headers = {PRINCIPAL_HEADER: principals.sign_as_service(service)}
        try:
            async with probes.get(f"{url}/readyz", headers=headers) as response:
                if response.status == 401:
                    return "the service does not trust this gateway: its TRUSTED_KEYS do not match our SIGNING_KEY"
                return None if response.status == 200 else _failing_checks(await response.read())
        except (TimeoutError, aiohttp.ClientError) as error:
            return f"the service does not answer: {type(error).__name__}"

    return check


def workers_by(url: str, probes: aiohttp.ClientSession) -> Check:
    """Degraded while the service at ``url`` knows no worker: only runs wait, as with workers scaled to zero."""

    async def check() -> str | None:
        try:
            async with probes.get(f"{url}/readyz") as response:
                found = (await response.json()).get("checks", {}).get("worker")
        except (TimeoutError, aiohttp.ClientError, ValueError):
            return Degraded("not known while job_orchestrator does not answer")
        return Degraded(found["message"]) if found and not found["ready"] else None

    return check


def _failing_checks(answer: bytes) -> str:
    try:
        checks = orjson.loads(answer)["checks"].items()
        return "not ready: " + "; ".join(f"{name}: {found['message']}" for name, found in checks if not found["ready"])
    except (ValueError, LookupError, TypeError, AttributeError):
        return "the service is not ready"
