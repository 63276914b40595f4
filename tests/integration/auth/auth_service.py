"""An auth service on a real mongod, called the way the gateway calls it."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

import aiohttp
from pydantic import SecretStr

from libs.contracts.internal import RESOLVE_CREDENTIAL, CredentialPresented, CredentialResolved
from libs.core.clock import ManualClock
from libs.core.principal import Principal
from libs.process.signing_keys import new_signing_key
from libs.service.running import RunningService, running_service
from libs.web.principals import PRINCIPAL_HEADER, PrincipalSigner
from services.auth.app import SERVICE
from services.auth.config import AuthSettings
from services.auth.http import CLIENT_ADDRESS_HEADER

BOOTSTRAP_KEY = "a bootstrap key of the tests"
FORM = "application/x-www-form-urlencoded"
GATEWAY_KEY, GATEWAY_PUBLIC_KEY = new_signing_key()
ADA = {"username": "ada", "email": "ada@example.com", "password": "password"}


@dataclass(frozen=True)
class Answer:
    status: int
    body: Any
    headers: Mapping[str, str]

    @property
    def data(self) -> Any:
        assert self.body["success"] is True, self.body
        return self.body["data"]

    @property
    def message(self) -> str:
        text: str = self.body["message"]
        return text


class Gateway:
    """Resolves credentials and forwards calls with a signed principal, as the gateway does."""

    def __init__(self, service: RunningService[AuthSettings], session: aiohttp.ClientSession) -> None:
        self.service = service
        self.session = session
        self.signer = PrincipalSigner("gateway", SecretStr(GATEWAY_KEY))

    async def resolve(self, credential: str, kind: str = "bearer") -> CredentialResolved:
        presented = CredentialPresented.model_validate({"kind": kind, "credential": credential})
        async with self.session.post(
            self.service.base_url + RESOLVE_CREDENTIAL.path,
            data=presented.model_dump_json(),
            headers={
                "Content-Type": "application/json",
                PRINCIPAL_HEADER: self.signer.sign_as_service("auth"),
            },
        ) as response:
            assert response.status == 200, await response.text()
            return CredentialResolved.model_validate_json(await response.read())

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        credential: str | None = None,
        principal: Principal | None = None,
        headers: Mapping[str, str] | None = None,
        address: str = "203.0.113.1",
    ) -> Answer:
        sent = {CLIENT_ADDRESS_HEADER: address, **(headers or {})}
        if credential is not None:
            sent["Authorization"] = f"Bearer {credential}"
            principal = (await self.resolve(credential)).principal
            assert principal is not None
        if principal is not None:
            sent[PRINCIPAL_HEADER] = self.signer.sign(principal, "auth")
        async with self.session.request(method, self.service.base_url + path, json=body, headers=sent) as response:
            text = await response.read()
            content = await response.json() if text else None
            return Answer(response.status, content, response.headers.copy())

    async def token(
        self, form: Any, *, headers: Mapping[str, str] | None = None, address: str = "203.0.113.1", query: str = ""
    ) -> Answer:
        """The token endpoint, with a form's fields, its pairs, or a body of bytes."""
        sent = {"Content-Type": FORM, CLIENT_ADDRESS_HEADER: address, **(headers or {})}
        body = form if isinstance(form, bytes) else urlencode(form)
        url = f"{self.service.base_url}/oauth/token{query}"
        async with self.session.post(url, data=body, headers=sent) as response:
            return Answer(response.status, await response.json(), response.headers.copy())

    async def sign_up(self, username: str = "ada", **fields: str) -> Answer:
        body = {"username": username, "email": f"{username}@example.com", "password": "password", **fields}
        return await self.call("POST", "/signup", body)

    async def log_in(self, username: str = "ada", password: str = "password", **options: Any) -> Answer:
        return await self.call("POST", "/login", {"username": username, "password": password}, **options)

    async def session_of(self, username: str = "ada") -> str:
        token: str = (await self.log_in(username)).data["token"]
        return token


class Auth:
    """Starts instances of the service on one database."""

    def __init__(self, mongod: str, database_prefix: str, stack: AsyncExitStack) -> None:
        self._mongod = mongod
        self._database_prefix = database_prefix
        self._stack = stack
        # The store's own clock removes what has expired, so that the tests' time begins at the present.
        self.clock = ManualClock(datetime.now(UTC))

    async def start(self, **settings: Any) -> Gateway:
        return await self._stack.enter_async_context(self.started(**settings))

    @asynccontextmanager
    async def started(self, **settings: Any) -> AsyncIterator[Gateway]:
        chosen = AuthSettings(
            mongodb_url=self._mongod,
            database_prefix=self._database_prefix,
            port=0,
            trusted_keys={"gateway": GATEWAY_PUBLIC_KEY},
            api_key=SecretStr(BOOTSTRAP_KEY),
            **settings,
        )
        async with (
            running_service(SERVICE, chosen, clock=self.clock) as service,
            aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session,
        ):
            yield Gateway(service, session)
