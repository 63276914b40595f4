"""Errors as responses: each family of the API has a shape of its own, chosen by the path."""

import math
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Literal

import orjson
from aiohttp import web

from libs.core.errors import (
    CallOperator,
    DataSyncError,
    FieldError,
    FixRequest,
    InsufficientScope,
    MethodNotAllowed,
    NotFound,
    RetryLater,
    TooLarge,
    Unauthenticated,
    UnsupportedMediaType,
)
from libs.core.text import readable
from libs.web.body import CODINGS
from libs.web.conditions import accepts_by_name

Family = Literal["project", "v2", "sync", "oauth", "internal"]

PROBLEM = "application/problem+json"
OAUTH_TOKEN_PATH = "/oauth/token"  # noqa: S105 - a path
RETRY_AFTER_SECONDS = 1.0
INTERNAL_MESSAGE = "something went wrong on our side; the request id finds it in the logs"


def family_of(path: str) -> Family:
    """Which of the contracts a path belongs to."""
    if path.startswith(("/api/v2/", "/v2/")) or path in ("/api/v2", "/v2"):
        return "v2"
    if path == "/api/v1/sync" or path.startswith("/api/v1/sync/"):
        return "sync"
    if path == OAUTH_TOKEN_PATH:
        return "oauth"
    if path.startswith("/internal/"):
        return "internal"
    return "project"


def error_answer(error: DataSyncError, family: Family, accept: str, request_id: str) -> web.Response:
    """The response to an error.

    Args:
        family: whose shape it has, see ``family_of``.
        accept: the request's ``Accept``: ``application/problem+json`` gets RFC 9457 in any family.
    """
    body: Mapping[str, Any]
    content_type = "application/json"
    match "sync" if accepts_by_name(accept, PROBLEM) else family:
        case "v2":
            body = {"error": _title(error.status), "message": error.message, "code": error.code} | _fields(error)
        case "sync":
            content_type = PROBLEM
            body = _problem(error, request_id)
        case "oauth":
            body = _oauth(error)
        case "internal":
            body = _internal(error)
        case "project":
            body = {"success": False, "message": error.message, "code": error.code} | _fields(error)
    return web.Response(
        status=error.status, body=_encoded(body), content_type=content_type, headers=_headers(error, family)
    )


def _encoded(body: Mapping[str, Any]) -> bytes:
    """JSON; a message may quote bytes of the caller that are not valid UTF-8."""
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError:
        return orjson.dumps(_readable(body))


def _readable(value: Any) -> Any:
    match value:
        case str():
            return readable(value)
        case list():
            return [_readable(item) for item in value]
        case Mapping():
            return {readable(name): _readable(item) for name, item in value.items()}
        case _:
            return value


def of_http_exception(error: web.HTTPException, path: str) -> DataSyncError:
    """An error that aiohttp raised, as one of ours."""
    match error:
        case web.HTTPMethodNotAllowed():
            return MethodNotAllowed(f"{path} does not take {error.method}")
        case web.HTTPNotFound():
            return NotFound(f"there is nothing at {path[:200]}", code="unknown_route")
        case web.HTTPRequestEntityTooLarge():
            return TooLarge("the request body is too large")
        case _ if error.status < 500:
            refused = FixRequest(error.reason)
            refused.status = error.status
            return refused
        case _:
            return CallOperator(INTERNAL_MESSAGE)


def error_of_internal(status: int, body: Mapping[str, Any]) -> DataSyncError:
    """The error that the called service raised."""
    message = str(body.get("message") or _title(status))
    code = str(body["code"]) if "code" in body else None
    known = _errors_by_name().get(str(body.get("kind")))
    error_type = known or (FixRequest if status < 500 else RetryLater if status in (503, 504) else CallOperator)
    error = error_type(
        message,
        code=code,
        errors=[FieldError(item["field"], item["message"], item["code"]) for item in body.get("errors", ())],
        retry_after_seconds=body.get("retry_after_seconds"),
    )
    error.status = status
    return error


def _errors_by_name() -> dict[str, type[DataSyncError]]:
    found: dict[str, type[DataSyncError]] = {}
    waiting: list[type[DataSyncError]] = [DataSyncError]
    while waiting:
        for error_type in waiting.pop().__subclasses__():
            found[error_type.__name__] = error_type
            waiting.append(error_type)
    return found


def _problem(error: DataSyncError, request_id: str) -> dict[str, Any]:
    """RFC 9457: errors have no pages of their own, so the type is ``about:blank`` and the title the status's phrase."""
    return {
        "type": "about:blank",
        "title": _title(error.status),
        "status": error.status,
        "detail": error.message,
        "code": error.code,
        "request_id": request_id,
        "errors": _field_list(error),
    }


_OAUTH_CODES = frozenset(
    {
        "invalid_request",
        "invalid_client",
        "invalid_grant",
        "unauthorized_client",
        "unsupported_grant_type",
        "invalid_scope",
    }
)
_NOT_IN_OAUTH = re.compile(r"[^\x20-\x21\x23-\x5b\x5d-\x7e]")


def _oauth(error: DataSyncError) -> dict[str, str]:
    """RFC 6749 section 5.2; codes that it lacks come from section 4.1.2.1, or are our own."""
    if error.code in _OAUTH_CODES:
        word = error.code
    elif error.status == HTTPStatus.TOO_MANY_REQUESTS:
        word = "too_many_requests"
    elif isinstance(error, RetryLater):
        word = "temporarily_unavailable"
    else:
        word = "invalid_request" if error.status < 500 else "server_error"
    return {"error": word, "error_description": _NOT_IN_OAUTH.sub("'", error.message)}


def _internal(error: DataSyncError) -> dict[str, Any]:
    return {
        "kind": type(error).__name__,
        "code": error.code,
        "message": error.message,
        "errors": _field_list(error),
        "retry_after_seconds": error.retry_after_seconds,
    }


def _fields(error: DataSyncError) -> dict[str, Any]:
    return {"errors": _field_list(error)} if error.errors else {}


def _field_list(error: DataSyncError) -> list[dict[str, str]]:
    return [{"field": item.field, "message": item.message, "code": item.code} for item in error.errors]


def _headers(error: DataSyncError, family: Family) -> dict[str, str]:
    headers = {"Cache-Control": "no-store"}
    match error:
        case Unauthenticated() if family == "oauth":
            headers["WWW-Authenticate"] = 'Basic realm="datasync"'
        case Unauthenticated():
            # RFC 6750 section 3: an error code only where a credential was given.
            given = "" if error.code == "unauthenticated" else ', error="invalid_token"'
            headers["WWW-Authenticate"] = f'Bearer realm="datasync"{given}'
        case InsufficientScope():
            scope = f', scope="{error.scope}"' if error.scope else ""
            headers["WWW-Authenticate"] = f'Bearer realm="datasync", error="insufficient_scope"{scope}'
        case UnsupportedMediaType() if error.code == "unsupported_content_encoding":
            headers["Accept-Encoding"] = CODINGS
    retry_after_seconds = error.retry_after_seconds
    if retry_after_seconds is None and error.status == HTTPStatus.SERVICE_UNAVAILABLE:
        retry_after_seconds = RETRY_AFTER_SECONDS
    if retry_after_seconds is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_seconds)))
    return headers


def _title(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"
