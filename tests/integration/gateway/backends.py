"""Small real services for the gateway to stand in front of."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web
from pydantic import SecretStr

from libs.contracts.internal import RESOLVE_CREDENTIAL, CredentialPresented, CredentialResolved
from libs.core.principal import Principal
from libs.process.health import Health
from libs.process.settings import ServiceSettings
from libs.process.signing_keys import new_signing_key
from libs.web import routes
from libs.web.answers import json_response
from libs.web.body import coding_of, inflated, pieces, read_coded
from libs.web.calls import Call
from libs.web.internal import internal_route
from libs.web.principals import PrincipalSigner, PrincipalVerifier
from libs.web.requests import PRINCIPAL
from libs.web.server import ServiceRunner
from libs.web.shell import create_app

GATEWAY_KEY, GATEWAY_PUBLIC_KEY = new_signing_key()

SESSION = "ds_sess_" + "a" * 38
API_KEY = "ds_live_" + "b" * 38
BOOTSTRAP_KEY = "correct horse battery"
PROJECT = 123
BODY_BYTES_MAX = 64 * 1024 * 1024


def a_user(name: str = "ada") -> Principal:
    return Principal(kind="user", subject="1", name=name, projects={PROJECT: "owner"}, scopes=("*",))


def a_key(*scopes: str) -> Principal:
    return Principal(kind="api_key", subject="k-1", name="ci", projects={PROJECT: "member"}, scopes=scopes or ("*",))


@dataclass
class Backend:
    """A service of one name on a port of its own that can be stopped and started again there."""

    name: str
    routes: Sequence[web.AbstractRouteDef]
    port: int = 0
    health: Health = field(default_factory=Health)
    trusted_keys: dict[str, str] = field(default_factory=lambda: {"gateway": GATEWAY_PUBLIC_KEY})
    _runner: ServiceRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        verifier = PrincipalVerifier(self.name, self.trusted_keys)
        app = create_app(self.name, self.routes, verifier, health=self.health, settings=ServiceSettings())
        self._runner = ServiceRunner(app, is_draining=lambda: False, shutdown_timeout_seconds=0.2)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None


class Auth:
    """Knows credentials, counts the look-ups, answers them while ``answers`` is set, and shows what it was sent."""

    def __init__(self) -> None:
        self.credentials: dict[tuple[str, str], Principal] = {
            ("session", SESSION): a_user(),
            ("bearer", SESSION): a_user(),
            ("bearer", API_KEY): a_key(),
            ("bearer", BOOTSTRAP_KEY): a_key(),
        }
        self.asked: Counter[str] = Counter()
        self.answers = asyncio.Event()
        self.answers.set()
        self.backend = Backend(
            "auth",
            [
                internal_route(RESOLVE_CREDENTIAL, self.resolve),
                web.post("/login", self.log_in),
                web.post("/logout", echo),
            ],
        )

    async def resolve(self, presented: CredentialPresented) -> CredentialResolved:
        self.asked[presented.credential] += 1
        principal = self.credentials.get((presented.kind, presented.credential))
        await self.answers.wait()
        return CredentialResolved(principal=principal, reason=None if principal else "revoked")

    async def was_asked(self, credential: str) -> None:
        """Return once somebody has asked about it."""
        while not self.asked[credential]:
            await asyncio.sleep(0.001)

    async def log_in(self, request: web.Request) -> web.Response:
        response = await echo(request)
        response.headers.add("Set-Cookie", f"datasync_session={SESSION}; HttpOnly; SameSite=Lax")
        response.headers.add("Set-Cookie", "theme=dark")
        return response


class Catalog:
    """Echoes, streams, and waits for ``go_on`` where a test wants it to."""

    def __init__(self) -> None:
        self.received_bytes = 0
        self.sent_bytes = 0
        self.hanging = 0
        self.listener: asyncio.BaseTransport | None = None
        self.go_on = asyncio.Event()
        project = "/api/v1/project/{projectid}"
        self.backend = Backend(
            "catalog",
            [
                *echoing(f"{project}/sources"),
                web.post(f"{project}/check-unique", echo),
                web.get(f"{project}/sources/stream", self.stream),
                web.get(f"{project}/sources/events", self.events),
                web.post(f"{project}/sources/upload", self.upload),
                web.get(f"{project}/sources/hang", self.hang),
                web.get(f"{project}/source/hang", self.hang),
                web.get(f"{project}/sources/broken", self.broken),
                web.get(f"{project}/sources/stalled", self.stalled),
                described(web.get(f"{project}/sources/tagged", self.tagged)),
            ],
        )

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """As many bytes as asked for, in pieces, with their number announced."""
        size_bytes = int(request.query["size"])
        response = web.StreamResponse(headers={"Content-Length": str(size_bytes)})
        await response.prepare(request)
        self.sent_bytes = 0
        while self.sent_bytes < size_bytes:
            piece = b"x" * min(256 * 1024, size_bytes - self.sent_bytes)
            await response.write(piece)
            self.sent_bytes += len(piece)
        return response

    async def events(self, request: web.Request) -> web.StreamResponse:
        """One event now, the next when the test says so."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        self.listener = request.transport
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await self.go_on.wait()
        await response.write(b"data: 2\n\n")
        return response

    async def upload(self, request: web.Request) -> web.Response:
        """Counts while the body comes, so that a test can see how far it is."""
        self.received_bytes = 0
        async for chunk in pieces(request, BODY_BYTES_MAX):
            self.received_bytes += len(chunk)
        return json_response({"received": self.received_bytes})

    async def hang(self, _: web.Request) -> web.Response:
        self.hanging += 1
        await self.go_on.wait()
        return json_response({})

    async def stalled(self, request: web.Request) -> web.StreamResponse:
        response = await _begun(request)
        await self.go_on.wait()
        return response

    async def broken(self, request: web.Request) -> web.StreamResponse:
        response = await _begun(request)
        assert request.transport is not None
        request.transport.abort()
        return response

    async def tagged(self, _: web.Request) -> web.Response:
        return json_response({"some": "thing" * 1000}, version=7)


async def _begun(request: web.Request) -> web.StreamResponse:
    """A response with a tenth of its body."""
    response = web.StreamResponse(headers={"Content-Length": "1000000"})
    await response.prepare(request)
    await response.write(b"x" * 100_000)
    return response


def echoing(path: str) -> list[web.RouteDef]:
    """Routes that echo what comes by any method; GET is said to read."""
    return [described(web.get(path, echo)), web.route("*", path, echo)]


def described(route: web.RouteDef, *, changes: bool | None = None) -> web.RouteDef:
    """A route of which the service knows whether it changes something."""

    async def handle(call: Call) -> web.StreamResponse:
        return await route.handler(call.request)

    return routes.route(route.method, route.path, handle, "Shown", tag="Test", changes=changes, project_from="nowhere")


async def echo(request: web.Request) -> web.Response:
    """What the service was sent."""
    principal: Principal | None = request.get(PRINCIPAL)
    coding, body = coding_of(request), await read_coded(request, BODY_BYTES_MAX)
    if coding != "identity":
        body = inflated(body, coding, BODY_BYTES_MAX)
    return json_response(
        {
            "method": request.method,
            "path": request.raw_path,
            "headers": {name.lower(): value for name, value in request.headers.items()},
            "body": body.decode(),
            "principal": principal and principal.model_dump(mode="json"),
        }
    )


@asynccontextmanager
async def started(*backends: Backend) -> AsyncIterator[None]:
    """Backends that listen until the block ends."""
    for backend in backends:
        await backend.start()
    try:
        yield
    finally:
        for backend in backends:
            await backend.stop()


def gateway_signer() -> PrincipalSigner:
    return PrincipalSigner("gateway", SecretStr(GATEWAY_KEY))
