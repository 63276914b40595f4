"""Every request from outside: who sent it, which service it goes to, and the gateway's own routes."""

import asyncio
from functools import partial
from typing import Annotated, Any

import orjson
from aiohttp import web
from multidict import CIMultiDict
from pydantic import Field

from libs.core.clock import isoformat_z
from libs.core.errors import NotFound
from libs.core.principal import FIRST_PROJECT_ID
from libs.process.telemetry import inject_trace
from libs.web import routes
from libs.web.body import read_bytes, require_readable
from libs.web.calls import Call
from libs.web.conditions import finished
from libs.web.openapi import Content
from libs.web.operational import PUBLIC_PATHS, metrics
from libs.web.principals import PRINCIPAL_HEADER, PrincipalSigner
from libs.web.requests import CLIENT_ADDRESS, PRINCIPAL, REQUEST_ID
from libs.web.shell import RESPONSE_HEADERS, ROUTE_LABEL, not_intended
from services.gateway.admission import Admission
from services.gateway.credential_cache import CredentialCache
from services.gateway.description import Description
from services.gateway.docs import MEDIA_TYPES, PAGE, SECURITY_POLICY, content_of, etag_of
from services.gateway.origins import SAFE_METHODS, Origins
from services.gateway.routes import Target, target_of, target_of_entity_type
from services.gateway.upstream.forwarding import Upstream
from services.gateway.upstream.headers import forwarded_headers

OWN_PATHS = frozenset({"/healthz", "/readyz", "/metrics", "/openapi.json", "/docs"})
CLIENT_ADDRESS_HEADER = "X-DataSync-Client-Address"
KEY_EXPIRES_HEADER = "X-DataSync-Key-Expires"


class Gateway:
    """Handles every request that is not for the gateway itself."""

    def __init__(
        self,
        own: "OwnRoutes",
        admission: Admission,
        credential_cache: CredentialCache,
        origins: Origins,
        upstream: Upstream,
        principals: PrincipalSigner,
    ) -> None:
        self._own = own
        self._admission = admission
        self._credential_cache = credential_cache
        self._origins = origins
        self._upstream = upstream
        self._principals = principals

    def routes(self) -> list[web.RouteDef]:
        return [*self._own.routes(), web.route("*", "/{path:.*}", self.handle)]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        request[CLIENT_ADDRESS] = self._admission.address_of(request)
        request[RESPONSE_HEADERS].update(self._origins.headers_for(request.headers))
        if request.method == "OPTIONS":
            request[ROUTE_LABEL] = "preflight"
            return web.Response(status=204, headers=self._origins.preflight_headers(request.headers))
        path, _, _ = request.raw_path.partition("?")
        target = _target_of(request, path)
        request[ROUTE_LABEL] = target.label
        require_readable(request)
        headers = forwarded_headers(request, with_credentials=target.service == "auth")
        if path in PUBLIC_PATHS:
            await self._admission.require_address(request)
        else:
            target = await self._authorize(request, path, target, headers)
        self._introduce(request, headers)
        response = await self._upstream.forward(request, target, headers)
        if target.service == "auth" and request.method not in SAFE_METHODS and path not in PUBLIC_PATHS:
            self._credential_cache.forget()
        return response

    async def _authorize(self, request: web.Request, path: str, target: Target, headers: CIMultiDict[str]) -> Target:
        """Add the signed principal to ``headers``, and return the final target."""
        caller = await self._admission.caller_of(request)
        request[PRINCIPAL] = caller.principal
        await self._admission.require_caller(request, path, caller.principal)
        if caller.expires_soon_at is not None:
            request[RESPONSE_HEADERS][KEY_EXPIRES_HEADER] = isoformat_z(caller.expires_soon_at)
        # The service knows which of its routes change something; those reject a token that may only read.
        may_only_read = caller.by_cookie and not self._origins.vouches_for(request.headers)
        if may_only_read and request.method not in SAFE_METHODS:
            raise not_intended()
        if target.by_entity_type:
            target = await _by_entity_type(request, target, headers)
        headers[PRINCIPAL_HEADER] = self._principals.sign(caller.principal, target.service, may_only_read=may_only_read)
        return target

    def _introduce(self, request: web.Request, headers: CIMultiDict[str]) -> None:
        headers["X-Request-Id"] = REQUEST_ID.get()
        headers["X-Forwarded-Host"] = request.host
        headers["X-Forwarded-Proto"] = request.scheme
        headers["X-Forwarded-For"] = headers[CLIENT_ADDRESS_HEADER] = request[CLIENT_ADDRESS]
        inject_trace(headers)


class OwnRoutes:
    """The routes that the gateway answers itself, besides its health."""

    def __init__(self, admission: Admission, origins: Origins) -> None:
        self._admission = admission
        self._origins = origins
        self.description: Description | None = None

    def routes(self) -> list[web.RouteDef]:
        get = partial(routes.get, tag="Operation", enveloped=False)
        page = Content("The page", str, "text/html")
        files = tuple(Content("A file of the page", bytes, kind) for kind in dict.fromkeys(MEDIA_TYPES.values()))
        return [
            get("/openapi.json", self.openapi, "This description", answer=dict[str, Any], versioned=True),
            get("/docs", self.docs, "A page to read and try the API", answer=page),
            get(
                "/docs/{file}",
                self.docs_file,
                "The files of that page",
                path_shapes={"file": Annotated[str, Field(examples=["start.js"])]},
                answer=files[0],
                also={200: files[1:]},
                versioned=True,
            ),
            get(
                "/metrics",
                self.metrics,
                "Metrics in Prometheus' text format",
                answer=Content("The page", str, "text/plain"),
                refuses=(503, 504),
            ),
        ]

    async def openapi(self, call: Call) -> web.StreamResponse:
        assert self.description is not None
        call.request[RESPONSE_HEADERS].update(self._origins.headers_for(call.request.headers))
        document = await self.description.document()
        headers = {"ETag": document.etag, "Cache-Control": "no-cache"}
        return finished(
            call.request, web.Response(body=document.text, content_type="application/json", headers=headers)
        )

    async def docs(self, call: Call) -> web.StreamResponse:
        headers = {"Content-Security-Policy": SECURITY_POLICY, "Cache-Control": "no-cache"}
        return web.Response(body=PAGE, content_type="text/html", charset="utf-8", headers=headers)

    async def docs_file(self, call: Call) -> web.StreamResponse:
        name = call.path("file")
        if name not in MEDIA_TYPES:
            raise NotFound(f"there is nothing at {call.request.path[:200]}", code="unknown_route")
        content = await asyncio.to_thread(content_of, name)
        headers = {"ETag": etag_of(name), "Cache-Control": "no-cache"}
        return finished(call.request, web.Response(body=content, content_type=MEDIA_TYPES[name], headers=headers))

    async def metrics(self, call: Call) -> web.StreamResponse:
        """For Prometheus; as the port is public, only for members of the first project, who run the installation."""
        caller = await self._admission.caller_of(call.request)
        caller.principal.require_project(FIRST_PROJECT_ID)
        return await metrics(call.request)


def _target_of(request: web.Request, path: str) -> Target:
    """The target of a path as it was sent.

    Raises:
        HTTPMethodNotAllowed: the path is the gateway's own.
        NotFound: no service owns it, or it contains ``..``.
    """
    if path in OWN_PATHS or path.startswith("/docs/"):
        raise web.HTTPMethodNotAllowed(request.method, ("GET", "HEAD"))
    target = target_of(path)
    if target is None or "/../" in path or path.endswith("/.."):
        raise NotFound(f"there is nothing at {request.path[:200]}", code="unknown_route")
    return target


async def _by_entity_type(request: web.Request, target: Target, headers: CIMultiDict[str]) -> Target:
    """Read the body, which decides about the target; a body that is not JSON is left to the service to reject."""
    body = await read_bytes(request)
    headers.popall("Content-Encoding", None)
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        return target
    return target_of_entity_type(target, fields.get("entity_type") if isinstance(fields, dict) else None)
