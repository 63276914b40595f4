"""Which headers pass the gateway, in both directions."""

from functools import lru_cache

from aiohttp import web
from multidict import CIMultiDict

from libs.web.upstream.wire import Headers

OUR_PREFIX = "x-datasync-"

_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""RFC 9110 section 7.6.1: for one connection only."""

_SET_BY_US = frozenset(
    {"host", "expect", "content-length", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "forwarded"}
)
_DROPPED_FROM_RESPONSES = _HOP_BY_HOP | {"date", "server", "x-request-id"}


def forwarded_headers(request: web.Request, *, with_credentials: bool) -> CIMultiDict[str]:
    """The request's headers that a service may see: none of this connection, none that claims to be the gateway's.

    Args:
        with_credentials: pass on ``Authorization`` and ``Cookie``, to the service that issues them.
    """
    dropped = set(_SET_BY_US)
    if not with_credentials:
        dropped |= {"authorization", "cookie"}
    connection = request.headers.get("Connection")
    if connection is not None:
        dropped |= _tokens(connection)
    headers: CIMultiDict[str] = CIMultiDict()
    for name, value in request.headers.items():
        lowered = name.lower()
        if lowered not in _HOP_BY_HOP and lowered not in dropped and not lowered.startswith(OUR_PREFIX):
            headers.add(name, value)
    headers["Host"] = request.host
    return headers


def response_headers(headers: Headers) -> CIMultiDict[str]:
    """The headers of a service's response that the caller may see."""
    passed: CIMultiDict[str] = CIMultiDict()
    named = named_by_connection(headers)
    for raw_name, value in headers:
        name = passed_name(raw_name)
        if name is not None and name.lower() not in named:
            passed.add(name, value.decode("utf-8", "surrogateescape"))
    return passed


def named_by_connection(headers: Headers) -> frozenset[str]:
    """The headers that the service meant for its connection to the gateway only."""
    named: frozenset[str] = frozenset()
    for name, value in headers:
        if len(name) == len("connection") and name.lower() == b"connection":
            named |= _tokens(value.decode("latin-1"))
    return named


@lru_cache(maxsize=1024)
def passed_name(raw: bytes) -> str | None:
    """The name of a response's header as text; None if it is not passed on."""
    name = raw.decode("ascii")
    lowered = name.lower()
    return None if lowered in _DROPPED_FROM_RESPONSES or lowered.startswith(OUR_PREFIX) else name


def _tokens(connection: str) -> frozenset[str]:
    return frozenset(token.strip().lower() for token in connection.split(","))
