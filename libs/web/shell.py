"""The middleware around every handler of a service.

Every request gets an id, a span in its caller's trace, a log line and a metric. On every path that is not public, the
caller is authenticated and authorized before the handler runs. Errors become responses in the family's shape.
"""

import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

import structlog
from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Handler
from opentelemetry.trace import Span

from libs.core.errors import (
    CallOperator,
    DataSyncError,
    FixRequest,
    Forbidden,
    NotFound,
    RetryLater,
    Unauthenticated,
)
from libs.core.ids import uuid7
from libs.core.text import is_text, readable
from libs.mongodb.client import is_passing
from libs.process.health import Health
from libs.process.logs import log_request
from libs.process.read_budget import HELD, count_reads
from libs.process.settings import ServiceSettings
from libs.process.telemetry import (
    HTTP_REQUESTS,
    IN_FLIGHT,
    current_traceparent,
    fail_span,
    server_span,
)
from libs.web.body import EXPECTATION, require_readable
from libs.web.conditions import finished
from libs.web.errors import INTERNAL_MESSAGE, error_answer, family_of, of_http_exception
from libs.web.openapi import DescribedRoute, Operation
from libs.web.operational import (
    DESCRIPTION_PATH,
    OPERATIONAL_PATHS,
    PUBLIC_PATHS,
    description_of,
    metrics,
    operational_routes,
)
from libs.web.principals import PRINCIPAL_HEADER, PrincipalVerifier
from libs.web.requests import CLIENT_ADDRESS, PRINCIPAL, REQUEST_ID, invalid_field
from libs.web.scopes import authorize

BODY_BYTES_MAX = 1024 * 1024


RESPONSE_HEADERS: web.RequestKey[dict[str, str]] = web.RequestKey("response_headers", dict)
ROUTE_LABEL: web.RequestKey[str] = web.RequestKey("route_label", str)

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

log = structlog.get_logger(__name__)


def create_app(
    service_name: str,
    routes: Sequence[web.AbstractRouteDef],
    verifier: PrincipalVerifier,
    *,
    health: Health,
    settings: ServiceSettings,
) -> web.Application:
    """The application of a service: its routes in the shell that all services share.

    Args:
        verifier: verifies the principals that the gateway and other services sign; a public service (the gateway)
            resolves credentials itself.
    """
    shell = _Shell(service_name, verifier, is_public=settings.public)
    app = web.Application(middlewares=[shell.around], client_max_size=BODY_BYTES_MAX)
    app.on_response_prepare.append(_add_headers)
    shell.add(app.router, operational_routes(health))
    if not settings.public:
        app.router.add_get("/metrics", metrics)
        app.router.add_get(DESCRIPTION_PATH, description_of(routes))
    shell.add(app.router, routes)
    return app


class _Shell:
    """The middleware."""

    def __init__(self, service_name: str, verifier: PrincipalVerifier, *, is_public: bool) -> None:
        self._service_name = service_name
        self._verifier = verifier
        self._is_public = is_public
        self._timers: dict[tuple[str, str, int], Any] = {}
        self._operations: dict[tuple[web.AbstractResource | None, str], Operation] = {}

    def add(self, router: web.UrlDispatcher, routes: Iterable[web.AbstractRouteDef]) -> None:
        """Register routes, and remember their operations."""
        for route in routes:
            [*_, registered] = route.register(router)
            if isinstance(route, DescribedRoute):
                self._operations[registered.resource, route.method] = route.operation

    @web.middleware
    async def around(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        started_at = time.perf_counter()
        request_id = _request_id_of(request)
        REQUEST_ID.set(request_id)
        structlog.contextvars.bind_contextvars(request_id=request_id)
        request[RESPONSE_HEADERS] = {"X-Request-Id": request_id, "Server": "datasync"}
        IN_FLIGHT.add()
        status = 499
        traceparent: str | None = None
        try:
            with server_span(request.method, request.headers) as span:
                traceparent = current_traceparent()
                response = await self._answer(request, handler, request_id)
                status = response.status
                if (EXPECTATION in request or _is_misframed(request)) and not response.prepared:
                    # Without 100 Continue the client may or may not send its body, so the connection can't be reused.
                    response.force_close()
                if span.is_recording():
                    _describe(span, request, status)
            return response
        finally:
            IN_FLIGHT.remove()
            self._account(request, status, time.perf_counter() - started_at, traceparent)

    async def _answer(self, request: web.Request, handler: Handler, request_id: str) -> web.StreamResponse:
        try:
            if not is_text(request.path):
                raise NotFound(f"there is nothing at {request.path[:200]}", code="unknown_route")
            _require_one_meaning(request)
            if self._is_public:
                return await handler(request)
            self._authenticate(request)
            if request.match_info.http_exception is None:
                require_readable(request)
                _require_supported(request, self._operation_of(request))
            request[HELD] = count_reads()
            return finished(request, await handler(request))
        except BaseException as error:
            if (held := request.get(HELD)) is not None:
                held.give_back()
            if not isinstance(error, Exception):
                raise
            if request.transport is None or request.transport.is_closing():
                raise ConnectionResetError("the caller has disconnected") from error
            if request.writer.output_size > 0:
                raise _cut(request, error) from error
            return self._answer_error(request, error, request_id)

    def _answer_error(self, request: web.Request, error: Exception, request_id: str) -> web.StreamResponse:
        path, accept = readable(request.path), request.headers.get("Accept", "")
        family = family_of(path)
        if self._is_public and family == "internal":
            family = "project"
        match error:
            case DataSyncError():
                if isinstance(error, CallOperator):
                    log.error("request_failed", path=path, error=error.message, code=error.code)
                return error_answer(error, family, accept, request_id)
            case web.HTTPException() if error.status < 400:
                raise error
            case web.HTTPException():
                answer = error_answer(of_http_exception(error, path), family, accept, request_id)
                if "Allow" in error.headers:
                    answer.headers["Allow"] = error.headers["Allow"]
                return answer
            case _ if is_passing(error):
                log.warning("store_unavailable", path=path, error=type(error).__name__)
                unavailable = RetryLater("the store can't be reached", retry_after_seconds=1)
                return error_answer(unavailable, family, accept, request_id)
            case _:
                log.error("request_crashed", path=path, error=repr(error), exc_info=error)
                return error_answer(CallOperator(INTERNAL_MESSAGE), family, accept, request_id)

    def _authenticate(self, request: web.Request) -> None:
        path = request.path
        token = request.headers.get(PRINCIPAL_HEADER)
        if token is None:
            if path in PUBLIC_PATHS or path in OPERATIONAL_PATHS:
                return
            raise Unauthenticated("authentication is required")
        verified = self._verifier.verify(token)
        principal = request[PRINCIPAL] = verified.principal
        if verified.may_only_read and request.match_info.http_exception is None and self._changes(request):
            raise not_intended()
        structlog.contextvars.bind_contextvars(principal=f"{principal.kind}/{principal.subject}")
        if principal.kind in ("api_key", "oauth_client"):
            resource = request.match_info.route.resource
            if resource is not None:
                authorize(principal, resource.canonical, changes=self._changes(request))
        elif principal.kind == "service" and not (path.startswith("/internal/") or path in PUBLIC_PATHS):
            raise Forbidden(f"the service {principal.subject} may call /internal only")

    def _changes(self, request: web.Request) -> bool:
        """Whether the matched route changes something; assumed of a route without an operation."""
        operation = self._operation_of(request)
        return operation is None or operation.changes

    def _operation_of(self, request: web.Request) -> Operation | None:
        method = "GET" if request.method == "HEAD" else request.method
        return self._operations.get((request.match_info.route.resource, method))

    def _account(self, request: web.Request, status: int, duration_seconds: float, traceparent: str | None) -> None:
        route = request.get(ROUTE_LABEL) or _route_of(request)
        method = request.method if request.method in _METHODS else "OTHER"
        key = (method, route, status // 100)
        timer = self._timers.get(key)
        if timer is None:
            timer = self._timers[key] = HTTP_REQUESTS.labels(method, route, f"{status // 100}xx")
        timer.observe(duration_seconds)
        path, duration_ms = readable(request.path), round(duration_seconds * 1000, 2)
        if self._is_public and path not in OPERATIONAL_PATHS:
            caller = request.get(PRINCIPAL)
            log_request(
                REQUEST_ID.get(),
                method,
                path,
                status,
                duration_ms,
                traceparent,
                principal=None if caller is None else f"{caller.kind}/{caller.subject}",
                client_address=request.get(CLIENT_ADDRESS),
            )
            return
        # The gateway has logged the requests that it forwarded.
        report = log.info if status >= 500 else log.debug
        report("http_request", method=method, path=path, status=status, duration_ms=duration_ms)


def _describe(span: Span, request: web.Request, status: int) -> None:
    """OpenTelemetry's semantic conventions for HTTP server spans."""
    route = request.get(ROUTE_LABEL) or _route_of(request)
    span.update_name(f"{request.method} {route}")
    span.set_attributes(
        {
            "http.request.method": request.method,
            "http.route": route,
            "url.path": readable(request.path),
            "http.response.status_code": status,
        }
    )
    if status >= 500:
        fail_span(span, str(status))


def not_intended() -> Forbidden:
    """The refusal of a call by session cookie that another site's page may have made."""
    return Forbidden(
        "calls by session cookie that change something must come from an allowed origin; "
        "add it to ALLOWED_ORIGINS, or send a token in Authorization",
        code="origin_not_allowed",
    )


def _is_misframed(request: web.Request) -> bool:
    """RFC 9112 section 6.1: a chunked HTTP/1.0 request may have passed a proxy that does not support the coding."""
    return request.version < HttpVersion11 and "Transfer-Encoding" in request.headers


def _require_one_meaning(request: web.Request) -> None:
    """Refuse requests that this service and a proxy in front of it could interpret differently."""
    if _is_misframed(request):
        raise FixRequest("Transfer-Encoding needs HTTP/1.1", code="malformed_request")
    if "Authorization" in request.headers and len(request.headers.getall("Authorization")) > 1:
        raise invalid_field("Authorization", "occurs twice")


_CONDITIONS = (
    ("Idempotency-Key", "idempotency_key_not_supported"),
    ("If-Match", "if_match_not_supported"),
    ("If-None-Match", "if_none_match_not_supported"),
)


def _require_supported(request: web.Request, operation: Operation | None) -> None:
    """Refuse a conditional header that this route does not support: its sender relies on it.

    A POST without lasting effects (logins, tests, previews) accepts any ``Idempotency-Key``.
    """
    if operation is None or request.method in ("GET", "HEAD"):
        return
    supported = {"Idempotency-Key": operation.idempotent or request.method == "POST", "If-Match": operation.conditional}
    for name, code in _CONDITIONS:
        if name in request.headers and not supported.get(name, False):
            raise FixRequest(f"{request.method} of this route does not support {name}; leave it out", code=code)


def _request_id_of(request: web.Request) -> str:
    given = request.headers.get("X-Request-Id")
    return given if given is not None and _SANE_REQUEST_ID.fullmatch(given) else uuid7()


def _route_of(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return "unmatched" if resource is None else resource.canonical


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    headers: dict[str, str] | None = request.get(RESPONSE_HEADERS)
    if headers is not None:
        vary = response.headers.get("Vary")
        response.headers.update(headers)
        if vary is not None and "Vary" in headers:
            response.headers["Vary"] = f"{vary}, {headers['Vary']}"


def _cut(request: web.Request, error: Exception) -> ConnectionResetError:
    """The status was already sent, so the connection is closed: an incomplete body tells the client of the error."""
    log.error("response_aborted", path=readable(request.path), error=repr(error), exc_info=error)
    if request.transport is not None:
        request.transport.abort()
    return ConnectionResetError("the response was aborted")
