"""A gateway in front of small real services, or of the real auth."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from pydantic import SecretStr

from libs.process.health import Health
from libs.process.live import Live
from libs.process.signing_keys import new_signing_key
from libs.service.running import running_service
from libs.testing.urls import url_settings
from services.auth.app import SERVICE as AUTH
from services.auth.config import AuthSettings
from services.gateway.app import SERVICE
from services.gateway.config import GatewaySettings
from tests.integration.gateway.backends import (
    API_KEY,
    BOOTSTRAP_KEY,
    GATEWAY_KEY,
    GATEWAY_PUBLIC_KEY,
    Auth,
    Backend,
    Catalog,
    described,
    echo,
    echoing,
    started,
)


@dataclass
class Suite:
    """The gateway and what stands behind it."""

    url: str
    auth: Auth
    catalog: Catalog
    jobs: Backend
    records: Backend
    health: Health


@pytest.fixture
async def suite(mongod: str, database_prefix: str) -> AsyncIterator[Suite]:
    auth, catalog = Auth(), Catalog()
    cancel = "/api/v1/project/{projectid}/jobs/{id}/cancel"
    routes = [described(web.get(cancel, echo), changes=True), web.post(cancel, echo)]
    routes += [
        route
        for path in (
            "/api/v1/project/{projectid}/jobs",
            "/api/v1/project/{projectid}/check-unique",
            "/api/v1/sync",
            "/api/v1/sync/{id}",
            "/api/v2/ingest",
        )
        for route in echoing(path)
    ]
    jobs = Backend("job_orchestrator", routes)
    records = Backend("record_sync", [])
    async with started(auth.backend, catalog.backend, jobs, records):
        settings = GatewaySettings(
            port=0,
            mongodb_url=mongod,
            database_prefix=database_prefix,
            rate_limit_project_per_minute=Live(1_000_000),
            **url_settings(
                auth=auth.backend.url,
                catalog=catalog.backend.url,
                job_orchestrator=jobs.url,
                record_sync=records.url,
            ),
            signing_key=SecretStr(GATEWAY_KEY),
            trusted_keys={"gateway": GATEWAY_PUBLIC_KEY},
            server_timeout=1.0,
            shutdown_timeout_seconds=0.3,
        )
        async with running_service(SERVICE, settings) as running:
            yield Suite(running.base_url, auth, catalog, jobs, records, running.context.health)


@pytest.fixture
async def client(suite: Suite) -> AsyncIterator[aiohttp.ClientSession]:
    """A caller with an API key."""
    headers = {"Authorization": f"Bearer {API_KEY}"}
    async with aiohttp.ClientSession(suite.url, headers=headers, cookie_jar=aiohttp.DummyCookieJar()) as session:
        yield session


@pytest.fixture
async def stranger(suite: Suite) -> AsyncIterator[aiohttp.ClientSession]:
    """A caller without a credential."""
    async with aiohttp.ClientSession(suite.url, cookie_jar=aiohttp.DummyCookieJar()) as session:
        yield session


@dataclass
class RealAuth:
    """Where a gateway listens, and the auth service behind it."""

    url: str
    auth_url: str


@pytest.fixture
async def real_auth(mongod: str, database_prefix: str) -> AsyncIterator[RealAuth]:
    """The auth service and an echoing catalog behind a gateway."""
    auth_key, auth_public_key = new_signing_key()
    common: dict[str, Any] = {
        "port": 0,
        "mongodb_url": mongod,
        "database_prefix": database_prefix,
        "trusted_keys": {"gateway": GATEWAY_PUBLIC_KEY, "auth": auth_public_key},
    }
    auth_settings = AuthSettings(**common, signing_key=SecretStr(auth_key), api_key=SecretStr(BOOTSTRAP_KEY))
    catalog = Backend("catalog", echoing("/api/v1/project/{projectid}/sources"))
    async with started(catalog), running_service(AUTH, auth_settings) as auth:
        settings = GatewaySettings(
            **common,
            rate_limit_project_per_minute=Live(1_000_000),
            **url_settings(auth=auth.base_url, catalog=catalog.url),
            signing_key=SecretStr(GATEWAY_KEY),
        )
        async with running_service(SERVICE, settings) as gateway:
            yield RealAuth(gateway.base_url, auth.base_url)
