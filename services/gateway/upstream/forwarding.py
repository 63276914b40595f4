"""Forwards one request to the service behind and answers it with the service's response."""

import asyncio
import time
from collections.abc import Mapping
from urllib.parse import quote

from aiohttp import web
from multidict import CIMultiDict

from libs.core.errors import RequestTimeout, RetryLater, UpstreamTimeout
from libs.process.telemetry import UPSTREAM_UNAVAILABLE
from libs.web.upstream.exchange import Exchange, ResponseTimeout
from libs.web.upstream.pool import ConnectFailed, ConnectionPool, PoolExhausted
from libs.web.upstream.wire import SAFE_METHODS, ResponseBroken, UpstreamRequest
from services.gateway.routes import Target
from services.gateway.upstream.bodies import RequestBody
from services.gateway.upstream.breaker import Breaker
from services.gateway.upstream.responses import pass_on

STOP_GRACE_SECONDS = 1.0


class Upstream:
    """The services behind the gateway, each with its own connections and circuit breaker.

    Args:
        urls: where each service listens; several URLs are separated by commas.
        timeout_seconds: until a response begins, unless the target has a timeout of its own.

    Attributes:
        pools: the connections of each service.
    """

    def __init__(self, urls: Mapping[str, str], timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self.pools = {service: ConnectionPool(url) for service, url in urls.items()}
        # Slow requests have connections of their own, so that many long polls can't block all others.
        self._slow_pools = {service: ConnectionPool(url, waits=False) for service, url in urls.items()}
        self._breakers = {service: Breaker(time.monotonic) for service in urls}
        self._waiting: set[asyncio.Timeout] = set()
        self._stop_at: float | None = None

    def stop(self) -> None:
        """The gateway is stopping: event streams end, and after a second so do reads that still have no response.

        Otherwise a long poll would keep the gateway from stopping for a minute.
        """
        self._stop_at = asyncio.get_running_loop().time() + STOP_GRACE_SECONDS
        for waiting in self._waiting:
            waiting.reschedule(self._stop_at)

    def close(self) -> None:
        for pool in (*self.pools.values(), *self._slow_pools.values()):
            pool.close()

    async def forward(self, request: web.Request, target: Target, headers: CIMultiDict[str]) -> web.StreamResponse:
        """Send the request to its target and pass the response on.

        Args:
            headers: what the service gets, see ``forwarded_headers``.

        Raises:
            RetryLater: the service can't be reached; without an attempt while its circuit is open.
            UpstreamTimeout: its response did not begin in time.
            TooLarge: the body is over the target's limit, by its announced length or while it is streamed.
            RequestTimeout: the body stopped coming.
        """
        breaker = self._breakers[target.service]
        wait_seconds = breaker.refuses_for_seconds()
        if wait_seconds is not None:
            raise _unavailable(target.service, wait_seconds)
        try:
            exchange = await self._send(request, target, headers)
        except ConnectFailed as error:
            breaker.failed()
            raise _unavailable(target.service) from error
        except BaseException:
            breaker.gave_up()
            raise
        breaker.connected()
        async with exchange:
            return await pass_on(request, exchange, lambda: self._stop_at is not None)

    async def _send(self, request: web.Request, target: Target, headers: CIMultiDict[str]) -> Exchange:
        timeout_seconds = target.timeout_seconds or self._timeout_seconds
        pools = self.pools if target.timeout_seconds is None else self._slow_pools
        body = RequestBody(request, target.body_bytes_max)
        try:
            sent = UpstreamRequest(
                request.method,
                _path_of(request),
                headers,
                await body.start(),
                body.announced_bytes,
                lambda: request.transport is not None and not request.transport.is_closing(),
                body.is_awaited,
            )
            return await self._exchange(pools[target.service], sent, timeout_seconds)
        except PoolExhausted:
            message = f"too many requests of this kind wait for the service {target.service}"
            raise RetryLater(message, code="too_many_waiting", retry_after_seconds=1) from None
        except ResponseTimeout:
            if body.is_coming:
                raise RequestTimeout("the request body did not arrive in time") from None
            raise UpstreamTimeout(f"no answer within {timeout_seconds:g} seconds", code="gateway_timeout") from None
        except ResponseBroken as error:
            if body.refusal is not None:
                raise body.refusal from None
            raise _broken_off(target.service) from error

    async def _exchange(self, pool: ConnectionPool, request: UpstreamRequest, timeout_seconds: float) -> Exchange:
        """Send the request; a read without a response is given up when the gateway stops."""
        if request.method not in SAFE_METHODS:
            return await pool.exchange(request, timeout_seconds)
        try:
            async with asyncio.timeout_at(self._stop_at) as waiting:
                self._waiting.add(waiting)
                try:
                    return await pool.exchange(request, timeout_seconds)
                finally:
                    self._waiting.discard(waiting)
        except TimeoutError:
            raise RetryLater("the gateway is shutting down", code="shutting_down", retry_after_seconds=1) from None


def _path_of(request: web.Request) -> str:
    """The path and query as they were sent; bytes outside ASCII, which no URL may contain, are escaped."""
    path = request.raw_path
    return path if path.isascii() else quote(path.encode("utf-8", "surrogateescape"), safe="%/?#[]@!$&'()*+,;=:~")


def _unavailable(service: str, retry_after_seconds: float = 1.0) -> RetryLater:
    UPSTREAM_UNAVAILABLE.labels(service).inc()
    return RetryLater(
        f"the service {service} is not available at the moment",
        code="service_unavailable",
        retry_after_seconds=retry_after_seconds,
    )


def _broken_off(service: str) -> RetryLater:
    UPSTREAM_UNAVAILABLE.labels(service).inc()
    return RetryLater(f"the service {service} ended the connection without an answer", code="service_broke_off")
