"""The HTTP shell of every service: requests into models, answers and errors into the family's shape.

Every request gets an id, a place in its caller's trace, a log line, a metric and, on every path that is not public, a
verified principal before its handler runs. Handlers return ``success(…)`` or ``json_answer(…)`` and raise core errors.
"""

import asyncio
import hashlib
import hmac
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, partial
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import orjson
import structlog
from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Handler
from opentelemetry.trace import Span
from pydantic import BaseModel, ValidationError

from libs.contracts.internal import InternalCall
from libs.core.clock import isoformat_z
from libs.core.envelope import Frozen, Metadata
from libs.core.errors import (
    CallOperator,
    DataSyncError,
    FieldError,
    FixRequest,
    Forbidden,
    InvalidInput,
    NotFound,
    RetryLater,
    Unauthenticated,
    UnsupportedMediaType,
)
from libs.core.ids import uuid7
from libs.core.json import parse_json
from libs.core.principal import Principal
from libs.core.text import is_text, number_of, readable
from libs.core.validation import field_errors
from libs.runtime.command_handler import IdempotencyKey
from libs.runtime.http_body import BODY, EXPECTATION, read_bytes, require_readable
from libs.runtime.http_conditions import finished
from libs.runtime.http_errors import INTERNAL_MESSAGE, error_answer, family_of, of_http_exception
from libs.runtime.logs import log_request
from libs.runtime.mongo import ConnectionFailure
from libs.runtime.openapi import Answered, Content, DescribedRoute, Json, Operation, describe, part_of
from libs.runtime.principals import PRINCIPAL_HEADER, PrincipalVerifier
from libs.runtime.read_budget import HELD, count_reads
from libs.runtime.scopes import authorize
from libs.runtime.settings import ServiceSettings
from libs.runtime.telemetry import (
    HTTP_REQUESTS,
    IN_FLIGHT,
    current_traceparent,
    fail_span,
    metrics_page,
    server_span,
)

BODY_BYTES_MAX = 1024 * 1024
IDEMPOTENCY_KEY_LENGTH_MAX = 255

PUBLIC_PATHS = frozenset(
    {"/login", "/signup", "/oauth/token", "/healthz", "/readyz", "/openapi.json", "/docs", "/telemetry-id"}
)
"""What answers without a credential."""

DESCRIPTION_PATH = "/internal/openapi.json"
"""Where a service tells its part of the API's description; the gateway forwards nothing below ``/internal``."""

OPERATIONAL_PATHS = frozenset({"/healthz", "/readyz", "/metrics", DESCRIPTION_PATH})

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
CLIENT_ADDRESS: web.RequestKey[str] = web.RequestKey("client_address", str)
PRINCIPAL: web.RequestKey[Principal] = web.RequestKey("principal", Principal)
RESPONSE_HEADERS: web.RequestKey[dict[str, str]] = web.RequestKey("response_headers", dict)
ROUTE_LABEL: web.RequestKey[str] = web.RequestKey("route_label", str)

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

log = structlog.get_logger(__name__)

ModelT = TypeVar("ModelT", bound=BaseModel)
RequestT = TypeVar("RequestT", bound=Frozen)
ResponseT = TypeVar("ResponseT", bound=Frozen)

Check = Callable[[], Awaitable[str | None]]


class Degraded(str):
    """A problem that does not keep this process from serving requests."""

    __slots__ = ()


class Health:
    """Whether this process should get requests: every check passes and it is not stopping."""

    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}
        self._listeners: list[Callable[[], None]] = []
        self._stopping = False

    def add(self, name: str, check: Check) -> None:
        """``check`` returns in bounded time the problem, ``Degraded`` if requests can still be served, or None."""
        self._checks[name] = check

    def stop(self) -> None:
        """Not ready from now on, so that no new work is sent here."""
        if not self._stopping:
            self._stopping = True
            for listener in self._listeners:
                listener()

    def on_stop(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` when the process begins to stop, before what is in flight is waited for."""
        self._listeners.append(listener)

    @property
    def stopping(self) -> bool:
        return self._stopping

    async def report(self) -> dict[str, str | None]:
        """What is wrong by check, None where nothing is."""
        names = list(self._checks)
        found = await asyncio.gather(*(self._run(self._checks[name]) for name in names))
        report = dict(zip(names, found, strict=True))
        return report | ({"shutdown": "the service is stopping"} if self._stopping else {})

    @staticmethod
    async def _run(check: Check) -> str | None:
        try:
            return await check()
        except Exception as error:  # noqa: BLE001 - a broken check is a failed check
            return f"the check failed: {type(error).__name__}"


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
        app.router.add_get(DESCRIPTION_PATH, _description_of(routes))
    shell.add(app.router, routes)
    return app


class _Shell:
    """What happens around every handler."""

    def __init__(self, service_name: str, verifier: PrincipalVerifier, *, is_public: bool) -> None:
        self._service_name = service_name
        self._verifier = verifier
        self._is_public = is_public
        self._timers: dict[tuple[str, str, int], Any] = {}
        self._operations: dict[tuple[web.AbstractResource | None, str], Operation] = {}

    def add(self, router: web.UrlDispatcher, routes: Iterable[web.AbstractRouteDef]) -> None:
        """Register routes, and remember what those that are described promise."""
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
                    # A client that got no 100 Continue may or may not send its body, so the connection can't be reused.
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
                _require_heeded(request, self._operation_of(request))
            request[HELD] = count_reads()
            return finished(request, await handler(request))
        except BaseException as error:
            if (held := request.get(HELD)) is not None:
                held.give_back()
            if not isinstance(error, Exception):
                raise
            if request.transport is None or request.transport.is_closing():
                raise ConnectionResetError("the caller is gone") from error
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
            case ConnectionFailure():
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
        """Whether the matched route changes something; assumed if it is not described."""
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
        # What came through the gateway stands in its log already.
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
    """RFC 9112 section 6.1: what HTTP/1.0 calls chunked may have passed a proxy that did not know the word."""
    return request.version < HttpVersion11 and "Transfer-Encoding" in request.headers


def _require_one_meaning(request: web.Request) -> None:
    """Refuse what this service and a proxy in front of it could read differently."""
    if _is_misframed(request):
        raise FixRequest("Transfer-Encoding needs HTTP/1.1", code="malformed_request")
    if "Authorization" in request.headers and len(request.headers.getall("Authorization")) > 1:
        raise _invalid("Authorization", "stands twice")


_UNHEEDED = (
    ("Idempotency-Key", "idempotency_key_not_supported"),
    ("If-Match", "if_match_not_supported"),
    ("If-None-Match", "if_none_match_not_supported"),
)


def _require_heeded(request: web.Request, operation: Operation | None) -> None:
    """Refuse a header that this route does not support and whose sender relies on it.

    A POST without effects of its own (logins, tests, previews) takes any ``Idempotency-Key``.
    """
    if operation is None or request.method in ("GET", "HEAD"):
        return
    heeded = {"Idempotency-Key": operation.idempotent or request.method == "POST", "If-Match": operation.conditional}
    for name, code in _UNHEEDED:
        if name in request.headers and not heeded.get(name, False):
            raise FixRequest(f"{request.method} of this route does not heed {name}; leave it out", code=code)


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
    """After the head has gone out the only honest end is an incomplete body: the connection is cut."""
    log.error("response_broken_off", path=readable(request.path), error=repr(error), exc_info=error)
    if request.transport is not None:
        request.transport.abort()
    return ConnectionResetError("the answer was broken off")


class HealthShown(Answered):
    status: Literal["ok"]


class CheckShown(Answered):
    ready: bool
    message: str


class ReadinessShown(Answered):
    status: Literal["ready", "degraded", "not ready"]
    checks: dict[str, CheckShown]


def operational_routes(health: Health) -> Sequence[web.RouteDef]:
    """What tells orchestrators whether the process lives, and whether it should get requests."""
    described = partial(describe, tag="Operation", enveloped=False)
    not_ready = Content("Not ready: some check fails, or the process is stopping", ReadinessShown)
    return [
        described(web.get("/healthz", _healthz), "Whether the process lives", answer=HealthShown),
        described(
            web.get("/readyz", _readyz_of(health)),
            "Whether the process should get requests",
            answer=ReadinessShown,
            also={503: not_ready},
        ),
    ]


async def _healthz(_: web.Request) -> web.Response:
    return json_answer({"status": "ok"})


def _readyz_of(health: Health) -> Handler:
    async def readyz(_: web.Request) -> web.Response:
        report = await health.report()
        problems = [problem for problem in report.values() if problem is not None]
        is_ready = all(isinstance(problem, Degraded) for problem in problems)
        checks = {name: {"ready": problem is None, "message": problem or ""} for name, problem in report.items()}
        status = "not ready" if not is_ready else "degraded" if problems else "ready"
        return json_answer({"status": status, "checks": checks}, 200 if is_ready else 503)

    return readyz


def _description_of(routes: Sequence[web.AbstractRouteDef]) -> Handler:
    """Written when it is first asked for: a service has it to start, and its callers to wait, without it."""
    written: list[Json] = []

    async def description(_: web.Request) -> web.Response:
        if not written:
            written.append(part_of(routes, PUBLIC_PATHS))
        return json_answer(written[0])

    return description


async def metrics(_: web.Request) -> web.Response:
    """The page that Prometheus scrapes."""
    page = await asyncio.to_thread(metrics_page)
    return web.Response(body=page, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


# Answers


def dump(value: Any) -> bytes:
    """JSON as the API writes it: compact, timestamps in UTC with ``Z``, ``orjson.Fragment`` untouched."""
    return orjson.dumps(value, default=_jsonable, option=orjson.OPT_PASSTHROUGH_DATETIME)


def _jsonable(value: Any) -> Any:
    match value:
        case datetime():
            return isoformat_z(value)
        case BaseModel():
            return dict(value)
        case set() | frozenset():
            return sorted(value)
        case _:
            raise TypeError(f"{type(value).__name__} is not JSON")


def success(
    data: Any, *, message: str = "", status: int = 200, etag: int | str | None = None, embeds_others: bool = False
) -> web.Response:
    """The project family's envelope.

    Args:
        etag: the entity's version; with ``embeds_others`` the tag also holds a hash of the body.
    """
    return json_answer({"success": True, "message": message, "data": data}, status, etag, embeds_others=embeds_others)


def json_answer(
    data: Any, status: int = 200, etag: int | str | None = None, *, embeds_others: bool = False
) -> web.Response:
    """A JSON body as it is, for the families without an envelope."""
    body = dump(data)
    response = web.Response(status=status, body=body, content_type="application/json")
    if etag is not None:
        digest = f".{hashlib.sha256(body).hexdigest()[:16]}" if embeds_others else ""
        response.headers["ETag"] = f'"{etag}{digest}"'
        response.headers["Cache-Control"] = "private, no-cache"
    return response


# Requests


async def read_raw_json(request: web.Request) -> Any:
    """The body as strict JSON.

    Raises:
        UnsupportedMediaType: the content type is not JSON.
        InvalidInput: not JSON, or JSON that breaks a rule of ``libs.core.json``.
        TooLarge: over the limit.
    """
    require_json(request)
    return parse_json(await read_bytes(request))


async def read_body(request: web.Request, model: type[ModelT]) -> ModelT:
    """The JSON body as a model; ``InvalidInput`` names every field that is missing, unknown or wrong."""
    await read_raw_json(request)
    try:
        return model.model_validate_json(request[BODY], strict=True)
    except ValidationError as error:
        raise invalid_input(error) from None


def read_query(request: web.Request, model: type[ModelT]) -> ModelT:
    """The query parameters as a model; a parameter given twice is refused."""
    return _model_of_query(_query_of(request), model)


async def read_query_or_body(request: web.Request, model: type[ModelT]) -> ModelT:
    """The fields of a GET that may stand in the query or in a JSON body.

    Raises:
        InvalidInput: both name a field and differ, or ``config`` stands in the query.
    """
    query = _query_of(request)
    if "config" in query:
        raise _invalid("config", "must not travel in a query, which logs and histories keep; send it in the body")
    if not request.body_exists or not await read_bytes(request):
        return _model_of_query(query, model)
    body = await read_raw_json(request)
    if not isinstance(body, dict):
        return await read_body(request, model)
    for name, value in query.items():
        if name in body and str(body[name]) != value:
            raise _invalid(name, "stands in the query and in the body with different values")
    _require_plain_numbers(query, model)
    fields = {**query, **{name: value for name, value in body.items() if value is not None}}
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise invalid_input(error) from None


def invalid_input(error: ValidationError) -> InvalidInput:
    """The refusal of what Pydantic found."""
    found = field_errors(error)
    message = "; ".join(f"{item.field or 'the body'}: {item.message}" for item in found[:5])
    return InvalidInput(message, errors=found)


def require_json(request: web.Request) -> None:
    """Raises ``UnsupportedMediaType`` unless the body says to be JSON in UTF-8."""
    content_type = request.content_type if "Content-Type" in request.headers else "absent"
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise UnsupportedMediaType(f"the content type must be application/json, and it is {content_type[:64]}")
    charset = request.charset
    if charset is not None and charset.lower() not in ("utf-8", "utf8"):
        raise UnsupportedMediaType(f"JSON is UTF-8, and the charset says {charset[:32]}")


def _query_of(request: web.Request) -> dict[str, str]:
    query = request.query
    for name, value in query.items():
        if not (is_text(name) and is_text(value)):
            raise _invalid(readable(name)[:64], "is not UTF-8")
        if len(query.getall(name)) > 1:
            raise _invalid(name, "stands twice in the query")
    return dict(query)


def _model_of_query(query: Mapping[str, str], model: type[ModelT]) -> ModelT:
    _require_plain_numbers(query, model)
    try:
        return model.model_validate(query)
    except ValidationError as error:
        raise invalid_input(error) from None


_PLAIN_NUMBER = {int: re.compile(r"-?[0-9]{1,19}"), float: re.compile(r"-?[0-9]{1,19}(?:\.[0-9]{1,19})?")}


def _require_plain_numbers(query: Mapping[str, str], model: type[BaseModel]) -> None:
    """Refuse ``1_0``, ``+1``, ``1.0`` and spaces, which pydantic would accept."""
    for name, (kind, texts) in _numbers_of(model).items():
        value = query.get(name)
        if value is not None and value not in texts and _PLAIN_NUMBER[kind].fullmatch(value) is None:
            raise _invalid(name, "must be an integer" if kind is int else "must be a number")


@lru_cache(maxsize=256)
def _numbers_of(model: type[BaseModel]) -> Mapping[str, tuple[type, frozenset[str]]]:
    """The numeric fields, each with the literal texts that it accepts too; fields that accept any text are left out."""
    found: dict[str, tuple[type, frozenset[str]]] = {}
    for name, field in model.model_fields.items():
        kinds = list(_kinds_of(field.annotation))
        number = next((kind for kind in (int, float) if kind in kinds), None)
        if number is not None and str not in kinds:
            found[field.alias or name] = (number, frozenset(kind for kind in kinds if isinstance(kind, str)))
    return found


def _kinds_of(annotation: Any) -> Iterator[Any]:
    """The types and the literal values that an annotation is made of."""
    origin = get_origin(annotation)
    if origin is None:
        yield annotation
    elif origin is Annotated:
        yield from _kinds_of(get_args(annotation)[0])
    elif origin is Literal:
        yield from get_args(annotation)
    else:
        for part in get_args(annotation):
            yield from _kinds_of(part)


def _invalid(field: str, message: str) -> InvalidInput:
    return InvalidInput(f"{field}: {message}", errors=[FieldError(field, message)])


def principal_of(request: web.Request) -> Principal:
    """Who is calling; ``Unauthenticated`` on a public path without a credential."""
    principal: Principal | None = request.get(PRINCIPAL)
    if principal is None:
        raise Unauthenticated("authentication is required")
    return principal


def project_of(request: web.Request) -> int:
    """The project of the path.

    Raises:
        NotFound: it is not a number.
        Forbidden: the caller is not a member.
    """
    text = request.match_info["projectid"]
    project_id = number_of(text)
    if project_id is None:
        raise NotFound(f"there is no project {text[:64]!r}")
    principal_of(request).require_project(project_id)
    return project_id


def metadata_of(request: web.Request) -> Metadata:
    """What the events of this request carry about it."""
    principal = request.get(PRINCIPAL)
    return Metadata(
        actor="anonymous" if principal is None else principal.name,
        project_id=project_of(request) if "projectid" in request.match_info else None,
        correlation_id=REQUEST_ID.get(),
        traceparent=current_traceparent(),
    )


def idempotency_key_of(request: web.Request) -> str | None:
    """The text of the request's ``Idempotency-Key``."""
    keys = request.headers.getall("Idempotency-Key", ())
    if not keys:
        return None
    if len(keys) > 1:
        raise _invalid("Idempotency-Key", "stands twice")
    key = keys[0]
    if not 1 <= len(key) <= IDEMPOTENCY_KEY_LENGTH_MAX or not key.isascii() or not key.isprintable():
        raise _invalid("Idempotency-Key", f"must be 1 to {IDEMPOTENCY_KEY_LENGTH_MAX} printable ASCII characters")
    return key


def cookie_of(request: web.Request, name: str) -> str:
    """A cookie's value, empty if it is missing or not UTF-8; the first one if there are two (RFC 6265 section 5.4).

    Cookies may come on several lines, as a proxy for HTTP/2 leaves them (RFC 9113 section 8.2.3).
    """
    if "Cookie" not in request.headers:
        return ""
    for line in request.headers.getall("Cookie"):
        for pair in line.split(";"):
            found, separator, value = pair.strip().partition("=")
            if separator and found == name:
                value = value.strip().removeprefix('"').removesuffix('"')
                return value if is_text(value) else ""
    return ""


def idempotency_of(request: web.Request, body: bytes | None = None) -> IdempotencyKey | None:
    """The request's ``Idempotency-Key``, made unique to the caller, the method and the path.

    Args:
        body: what must be the same when the key comes again; by default the body that was read.
    """
    key = idempotency_key_of(request)
    if key is None:
        return None
    principal = request.get(PRINCIPAL)
    caller = ("anonymous", "") if principal is None else (principal.kind, principal.subject)
    parts = (*caller, request.method, request.path, key)
    identity = hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
    content = request.get(BODY, b"") if body is None else body
    # Keyed by what is not kept, so that a password in the body can't be guessed from what is.
    return IdempotencyKey(identity, hmac.digest(key.encode(), content, "sha256").hex())


# Internal calls


def internal_route(
    call: InternalCall[RequestT, ResponseT], handler: Callable[[RequestT], Awaitable[ResponseT]]
) -> web.RouteDef:
    """The route that answers an internal call, to the services that may make it."""

    async def answer(request: web.Request) -> web.Response:
        caller = principal_of(request)
        if caller.kind != "service" or caller.subject not in call.callers:
            raise Forbidden(f"{caller.kind} {caller.subject} may not call {call.path}")
        body = await read_bytes(request)
        try:
            model = call.request.model_validate_json(body, extra="ignore")
        except ValidationError as error:
            raise invalid_input(error) from None
        response = await handler(model)
        return web.Response(body=response.model_dump_json().encode(), content_type="application/json")

    return web.post(call.path, answer)
