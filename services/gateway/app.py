"""The composition root of the gateway."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import orjson
from aiohttp import web

from libs.mongodb.client import connect
from libs.process.health import Check, Degraded
from libs.process.version import installed_version
from libs.service.definition import ServiceContext, ServiceDefinition
from libs.web.openapi import part_of
from libs.web.operational import PUBLIC_PATHS, operational_routes
from libs.web.principals import PRINCIPAL_HEADER, PrincipalSigner
from services.gateway.addresses import ClientAddresses
from services.gateway.admission import Admission
from services.gateway.config import GatewaySettings
from services.gateway.credentials import Credentials
from services.gateway.description import Description
from services.gateway.http import Gateway, OwnRoutes
from services.gateway.origins import Origins
from services.gateway.rate_limits.limiter import RateLimiter
from services.gateway.rate_limits.policies import Policies
from services.gateway.upstream.forwarding import Upstream

FORWARDED_TO = ("auth", "catalog", "job_orchestrator", "record_sync", "webhooks")
NEEDED = ("auth", "catalog", "job_orchestrator", "record_sync")
READINESS_TIMEOUT_SECONDS = 1.0


@asynccontextmanager
async def start(context: ServiceContext[GatewaySettings]) -> AsyncIterator[Sequence[web.AbstractRouteDef]]:
    """Open the connections to the services behind."""
    settings = context.settings
    async with AsyncExitStack() as stack:
        upstream = Upstream(
            {service: settings.url_of(service) for service in FORWARDED_TO},
            settings.server_timeout,
        )
        stack.callback(upstream.close)
        context.health.on_stop(upstream.stop)
        credentials = Credentials(context.internal)
        stack.push_async_callback(credentials.close)
        probes = await stack.enter_async_context(
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=READINESS_TIMEOUT_SECONDS))
        )
        for service in NEEDED:
            context.health.add(service, _readiness_of(probes, settings.url_of(service), context.principals, service))
        context.health.add("worker", _workers_of(probes, settings.url_of("job_orchestrator")))
        limiter = await stack.enter_async_context(_rate_limiter(context))
        admission = Admission(credentials, limiter, Policies(settings), ClientAddresses(settings.trusted_proxies))
        origins = Origins(settings.allowed_origins)
        own = OwnRoutes(admission, origins)
        part = part_of([*own.routes(), *operational_routes(context.health)], PUBLIC_PATHS, is_served=False)
        urls = {service: settings.url_of(service) for service in FORWARDED_TO}
        own.description = Description(probes, urls, part, installed_version())
        yield Gateway(own, admission, credentials, origins, upstream, context.principals).routes()


@asynccontextmanager
async def _rate_limiter(context: ServiceContext[GatewaySettings]) -> AsyncIterator[RateLimiter]:
    settings = context.settings
    client = connect(
        settings.mongodb_url, SERVICE.name, pool_min=settings.database_pool_min, pool_max=settings.database_pool_max
    )
    limiter = RateLimiter(client[settings.database_prefix + SERVICE.name], settings.instance)
    try:
        if settings.rate_limits:
            await limiter.open()
            context.tasks.start("rate-limits", limiter.run)
        yield limiter
        if settings.rate_limits:
            await limiter.close()
    finally:
        client.close()


def _readiness_of(probes: aiohttp.ClientSession, url: str, principals: PrincipalSigner, service: str) -> Check:
    """Whether the service is ready and trusts this gateway's key."""

    async def check() -> str | None:
        headers = {PRINCIPAL_HEADER: principals.sign_as_service(service)}
        try:
            async with probes.get(f"{url}/readyz", headers=headers) as response:
                if response.status == 401:
                    return "the service does not trust this gateway: its TRUSTED_KEYS do not match our SIGNING_KEY"
                return None if response.status == 200 else _what_is_wrong(await response.read())
        except (TimeoutError, aiohttp.ClientError) as error:
            return f"the service does not answer: {type(error).__name__}"

    return check


def _what_is_wrong(answer: bytes) -> str:
    """The failing checks of a service, by name."""
    try:
        checks = orjson.loads(answer)["checks"].items()
        return "not ready: " + "; ".join(f"{name}: {found['message']}" for name, found in checks if not found["ready"])
    except (ValueError, LookupError, TypeError, AttributeError):
        return "the service is not ready"


def _workers_of(probes: aiohttp.ClientSession, url: str) -> Check:
    """Degraded while there is no worker: only runs wait, as with workers scaled to zero."""

    async def check() -> str | None:
        try:
            async with probes.get(f"{url}/readyz") as response:
                told = (await response.json()).get("checks", {}).get("worker")
        except (TimeoutError, aiohttp.ClientError, ValueError):
            return Degraded("not known while job_orchestrator does not answer")
        return Degraded(told["message"]) if told and not told["ready"] else None

    return check


SERVICE = ServiceDefinition(name="gateway", settings=GatewaySettings, start=start, uses_store=False)
