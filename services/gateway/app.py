"""The composition root of the gateway."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from aiohttp import web

from libs.contracts.internal import RESOLVE_CREDENTIAL, CredentialPresented, CredentialResolved
from libs.contracts.services import SERVICES, names_forwarded_to
from libs.mongodb.client import connect
from libs.process.version import installed_version
from libs.service.definition import ServiceContext, ServiceDefinition
from libs.web.internal import InternalClient
from libs.web.openapi import part_of
from libs.web.operational import PUBLIC_PATHS, operational_routes
from services.gateway.addresses import ClientAddresses
from services.gateway.admission import Admission
from services.gateway.config import GatewaySettings
from services.gateway.credential_cache import Credential, CredentialCache
from services.gateway.credentials import Credentials
from services.gateway.description import Description
from services.gateway.http import Gateway, OwnRoutes
from services.gateway.origins import Origins
from services.gateway.rate_limits.limiter import RateLimiter
from services.gateway.rate_limits.policies import Policies
from services.gateway.readiness import readiness_of, workers_by
from services.gateway.upstream.forwarding import Upstream


@asynccontextmanager
async def start(context: ServiceContext[GatewaySettings]) -> AsyncIterator[Sequence[web.AbstractRouteDef]]:
    """Open the connections to the services behind."""
    settings = context.settings
    async with AsyncExitStack() as stack:
        urls = {row.name: settings.urls_of(row.name) for row in SERVICES if row.is_forwarded_to}
        upstream = Upstream(urls, settings.server_timeout)
        stack.callback(upstream.close)
        context.health.on_stop(upstream.stop)
        cache = CredentialCache(_look_up(context.internal))
        stack.push_async_callback(cache.close)
        for service in sorted(names_forwarded_to(SERVICES)):
            context.health.add(service, readiness_of(service, upstream.pools[service], context.principals))
        context.health.add("worker", workers_by(upstream.pools["job_orchestrator"]))
        limiter = await stack.enter_async_context(_rate_limiter(context))
        addresses = ClientAddresses(settings.trusted_proxies)
        admission = Admission(Credentials(cache), limiter, Policies(settings), addresses)
        origins = Origins(settings.allowed_origins)
        own = OwnRoutes(admission, origins)
        part = part_of([*own.routes(), *operational_routes(context.health)], PUBLIC_PATHS, is_served=False)
        own.description = Description(upstream.pools, part, installed_version())
        yield Gateway(own, admission, cache, origins, upstream, context.principals).routes()


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


def _look_up(internal: InternalClient) -> Callable[[Credential], Awaitable[CredentialResolved]]:
    async def look_up(credential: Credential) -> CredentialResolved:
        presented = CredentialPresented(kind=credential.kind, credential=credential.text)
        return await internal.call(RESOLVE_CREDENTIAL, presented)

    return look_up


SERVICE = ServiceDefinition(name="gateway", settings=GatewaySettings, start=start, uses_store=False)
