"""The record sync service for tests: started in this process, called as the gateway calls it."""

import itertools
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import orjson
from pydantic import SecretStr

from libs.core.clock import Clock
from libs.core.principal import Principal
from libs.process.signing_keys import new_signing_key
from libs.service.definition import ServiceContext
from libs.service.running import running_service
from libs.web.principals import PRINCIPAL_HEADER, PrincipalSigner
from services.record_sync.app import SERVICE
from services.record_sync.config import RecordSyncSettings

GATEWAY_KEY, GATEWAY_PUBLIC_KEY = new_signing_key()
SERVICE_KEY, SERVICE_PUBLIC_KEY = new_signing_key()
RECORDS = "/api/v1/sync/records"

_PROJECTS = itertools.count(123)


@dataclass
class Answer:
    status: int
    content: bytes
    headers: Mapping[str, str]

    @property
    def body(self) -> Any:
        return orjson.loads(self.content)

    @property
    def fields(self) -> list[str]:
        """The fields at fault of a problem."""
        assert self.headers["Content-Type"].startswith("application/problem+json")
        return [item["field"] for item in self.body["errors"]]

    def created(self) -> Any:
        assert self.status == 201, self.content
        return self.body

    def ok(self) -> Any:
        assert self.status == 200, self.content
        return self.body


@dataclass
class RecordService:
    """A running instance as one caller of one project sees it."""

    base_url: str
    context: ServiceContext[RecordSyncSettings]
    session: aiohttp.ClientSession
    project: int
    developer_id: str | None = None
    scopes: tuple[str, ...] = ("*",)

    def in_new_project(self) -> "RecordService":
        return replace(self, project=next(_PROJECTS))

    def for_developer(self, developer_id: str) -> "RecordService":
        """The same project with a key that is bound to a developer."""
        return replace(self, developer_id=developer_id)

    def with_scopes(self, *scopes: str) -> "RecordService":
        return replace(self, scopes=scopes)

    @property
    def principal(self) -> Principal:
        return Principal(
            kind="api_key",
            subject="k1",
            name="ada's key",
            projects={self.project: "member"},
            scopes=self.scopes,
            developer_id=self.developer_id,
        )

    def headers(self, principal: Principal | None = None) -> dict[str, str]:
        signer = PrincipalSigner("gateway", SecretStr(GATEWAY_KEY))
        return {PRINCIPAL_HEADER: signer.sign(principal or self.principal, "record_sync")}

    async def request(
        self,
        method: str,
        path: str = "",
        body: Any = None,
        *,
        text: bytes | str | None = None,
        headers: Mapping[str, str] | None = None,
        principal: Principal | None = None,
        **query: Any,
    ) -> Answer:
        """A call below ``/api/v1/sync/records``; ``text`` sends a body as it stands."""
        all_headers = {**self.headers(principal), **(headers or {})}
        sent: dict[str, Any] = {} if body is None else {"json": body}
        if text is not None:
            sent = {"data": text}
            all_headers.setdefault("Content-Type", "application/json")
        params = {name: str(value) for name, value in query.items()}
        url = f"{self.base_url}{RECORDS}{path}"
        async with self.session.request(method, url, headers=all_headers, params=params, **sent) as response:
            return Answer(response.status, await response.read(), response.headers.copy())

    async def create(self, key: str = "flag-1", **changes: Any) -> Any:
        """The record that a creation answers with."""
        return (await self.request("POST", body=record_body(key, **changes))).created()

    async def list(self, **query: Any) -> Any:
        return (await self.request("GET", **query)).ok()


def record_body(key: str = "flag-1", **changes: Any) -> dict[str, Any]:
    return {
        "developerId": "dev-1",
        "resourceType": "FEATURE_FLAG_STATE",
        "resourceKey": key,
        "data": {"enabled": False},
    } | changes


@asynccontextmanager
async def running_record_service(
    mongod: str, database_prefix: str, *, clock: Clock | None = None
) -> AsyncIterator[RecordService]:
    """An instance on a test's own database."""
    settings = RecordSyncSettings(
        mongodb_url=mongod,
        database_prefix=database_prefix,
        port=0,
        signing_key=SecretStr(SERVICE_KEY),
        trusted_keys={"gateway": GATEWAY_PUBLIC_KEY, "record_sync": SERVICE_PUBLIC_KEY},
    )
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(running_service(SERVICE, settings, clock=clock))
        session = await stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar())
        )
        yield RecordService(service.base_url, service.context, session, next(_PROJECTS))
