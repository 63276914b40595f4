"""What pages of other origins may do: read responses (the Fetch standard's CORS protocol), and send cookies."""

from collections.abc import Mapping

from libs.process.live import Live

METHODS = "GET, POST, PUT, PATCH, DELETE, OPTIONS"
REQUEST_HEADERS = (
    "Origin, Content-Type, Accept, Authorization, X-Requested-With, X-Request-Id, Idempotency-Key, If-Match, "
    "If-None-Match, Range, Last-Event-ID, traceparent, tracestate, "
    "X-Project-Id"
)
RESPONSE_HEADERS = (
    "X-Request-Id, ETag, Location, Retry-After, Allow, Content-Disposition, WWW-Authenticate, RateLimit, "
    "RateLimit-Policy, X-RateLimit-Limit, X-RateLimit-Remaining, X-RateLimit-Reset, "
    "X-RateLimit-Mode, X-DataSync-Key-Expires"
)
PREFLIGHT_SECONDS = 600

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class Origins:
    """The rules for pages that call the API.

    Args:
        allowed: origins such as ``http://localhost:8000``.
    """

    def __init__(self, allowed: Live[tuple[str, ...]]) -> None:
        self._allow(allowed.value)
        allowed.subscribe(self._allow)

    def _allow(self, origins: tuple[str, ...]) -> None:
        self._allowed = frozenset(origin.lower() for origin in origins)

    def headers_for(self, headers: Mapping[str, str]) -> dict[str, str]:
        """The headers of every response to this request, errors included."""
        origin = headers.get("Origin")
        if origin is None or origin.lower() not in self._allowed:
            return {"Vary": "Origin"}
        return {
            "Vary": "Origin",
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Credentials": "true",
            "Access-Control-Expose-Headers": RESPONSE_HEADERS,
        }

    def preflight_headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """The headers of the response to ``OPTIONS``, which needs no credential."""
        if "Access-Control-Allow-Origin" not in self.headers_for(headers):
            return {"Allow": METHODS}
        return {
            "Allow": METHODS,
            "Access-Control-Allow-Methods": METHODS,
            "Access-Control-Allow-Headers": REQUEST_HEADERS,
            "Access-Control-Max-Age": str(PREFLIGHT_SECONDS),
        }

    def vouches_for(self, headers: Mapping[str, str]) -> bool:
        """Whether an allowed page sent the request: its ``Origin`` or ``Referer`` is the gateway's own or allowed.

        If a browser sends neither, ``Sec-Fetch-Site`` must be ``same-origin``. ``same-site`` is not enough, as other
        ports of the machine and other hosts of the domain are of the same site.
        """
        origin = headers.get("Origin") or _origin_of(headers.get("Referer", ""))
        if not origin:
            return headers.get("Sec-Fetch-Site") == "same-origin"
        return origin.lower() in self._allowed or _is_own(origin, headers.get("Host", ""))


def _origin_of(referer: str) -> str:
    scheme, separator, rest = referer.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}" if separator else ""


def _is_own(origin: str, host: str) -> bool:
    _, separator, origin_host = origin.partition("://")
    return bool(separator and host) and origin_host.lower() == host.lower()
