"""Kept-alive connections to one service, at all of its addresses.

A connection is used again only if nothing can be left on it: the request was sent whole, its response was read to its
end, not one byte came after it, neither side said close, and the caller is still there.
"""

import asyncio
import ssl
import time
from collections import deque

from yarl import URL

from services.gateway.upstream.endpoints import Address, Endpoints, Resolve, resolved
from services.gateway.upstream.exchange import Connection, Exchange, ResponseTimeout
from services.gateway.upstream.wire import ResponseBroken, UpstreamRequest

CONNECTIONS_MAX = 256
CONNECT_TIMEOUT_SECONDS = 1.0
IDLE_SECONDS = 20.0
"""Less than the services keep idle connections, so that none is used at the moment when it is closed."""
UNSAFE_IDLE_SECONDS = 4.0
"""What can't be sent again uses no connection that was idle for longer. A service that stops answers requests for some
seconds, and closes each connection with its response, before it closes those that were idle meanwhile."""
HEAD_TIMEOUT_SECONDS = 120.0


class PoolExhausted(Exception):
    """All connections are in use."""


class ConnectFailed(Exception):
    """The service does not accept connections."""


class ConnectionPool:
    """The connections to one service: at most 256 at a time, idle ones kept for 20 seconds.

    Args:
        url: scheme, host and port.
        waits: a request waits while all connections are in use; else it is rejected at once.
        resolve: looks up the addresses of the host.
    """

    def __init__(self, url: str, *, waits: bool = True, resolve: Resolve = resolved) -> None:
        parsed = URL(url)
        self._host = parsed.host or ""
        self._endpoints = Endpoints(self._host, parsed.port or 80, time.monotonic, resolve)
        self._tls = ssl.create_default_context() if parsed.scheme == "https" else None
        self._idle: deque[tuple[Connection, float]] = deque()
        self._places = asyncio.Semaphore(CONNECTIONS_MAX)
        self._waits = waits
        self._sweeping: asyncio.TimerHandle | None = None

    def close(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
        while self._idle:
            connection, _ = self._idle.pop()
            connection.transport.close()

    async def exchange(self, request: UpstreamRequest, timeout_seconds: float = HEAD_TIMEOUT_SECONDS) -> Exchange:
        """Send a request and await the head of its response; the caller closes the exchange.

        A safe request is sent again, once and on a new connection, if its connection ended before any byte of the
        response: the service may be restarting.

        Raises:
            ConnectFailed: the service rejects connections, or accepts none within a second.
            PoolExhausted: all connections are in use, and this pool does not wait.
            ResponseBroken: the connection ended without a response.
            ResponseTimeout: the response did not begin in time.
        """
        exchange = await self._begin(request, timeout_seconds, may_reuse=True)
        try:
            return await self._sent(exchange, timeout_seconds)
        except ResponseBroken:
            if not exchange.may_be_repeated:
                raise
        exchange = await self._begin(request, timeout_seconds, may_reuse=False)
        return await self._sent(exchange, timeout_seconds)

    async def _sent(self, exchange: Exchange, timeout_seconds: float) -> Exchange:
        address = exchange.address
        try:
            await exchange.send(timeout_seconds)
        except ResponseTimeout:
            exchange.close()
            # A caller whose upload stalls says nothing about the service.
            if exchange.was_sent_whole:
                self._eject(address)
            raise
        except BaseException:
            exchange.close()
            raise
        self._endpoints.answered(address)
        return exchange

    def _eject(self, address: Address) -> None:
        """Send nothing more to an address for a while, if the service has others."""
        self._endpoints.failed(address)
        if self._endpoints.is_only(address):
            return
        for connection, _ in [item for item in self._idle if item[0].address == address]:
            connection.abort()

    async def _begin(self, request: UpstreamRequest, timeout_seconds: float, *, may_reuse: bool) -> Exchange:
        if self._places.locked():
            if not self._waits:
                raise PoolExhausted
            try:
                async with asyncio.timeout(timeout_seconds):
                    await self._places.acquire()
            except TimeoutError:
                raise ResponseTimeout("no connection became free in time") from None
        else:
            await self._places.acquire()
        try:
            idle_seconds = IDLE_SECONDS if request.is_repeatable else UNSAFE_IDLE_SECONDS
            connection = (self._kept(idle_seconds) if may_reuse else None) or await self._connect()
        except BaseException:
            self._places.release()
            raise
        return Exchange(connection, request, self._release)

    def _kept(self, idle_seconds: float) -> Connection | None:
        """The connection that was used last, unless it has been idle for longer."""
        oldest = asyncio.get_running_loop().time() - idle_seconds
        while self._idle and self._idle[-1][1] > oldest:
            connection, _ = self._idle.pop()
            if connection.is_usable:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> Connection:
        """Connect to the first address that accepts."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
                addresses = await self._endpoints.in_order()
        except (OSError, TimeoutError) as error:
            raise ConnectFailed(str(error)) from error
        failure: Exception | None = None
        for address in addresses:
            try:
                return await self._connect_to(address, CONNECT_TIMEOUT_SECONDS / min(len(addresses), 2))
            except (OSError, TimeoutError) as error:
                self._eject(address)
                failure = error
        raise ConnectFailed(str(failure)) from failure

    async def _connect_to(self, address: Address, timeout_seconds: float) -> Connection:
        host, port = address
        async with asyncio.timeout(timeout_seconds):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: Connection(address, self._forget),
                host,
                port,
                ssl=self._tls,
                server_hostname=self._host if self._tls else None,
            )
        return connection

    def _release(self, connection: Connection, is_clean: bool) -> None:
        """Keep a connection on which nothing is left, end any other."""
        self._places.release()
        if not is_clean:
            connection.abort()
            return
        loop = asyncio.get_running_loop()
        self._idle.append((connection, loop.time()))
        if self._sweeping is None:
            self._sweeping = loop.call_later(IDLE_SECONDS, self._sweep)

    def _forget(self, ended: Connection) -> None:
        """Remove a connection that ended while it was idle."""
        if any(connection is ended for connection, _ in self._idle):
            self._idle = deque(item for item in self._idle if item[0] is not ended)

    def _sweep(self) -> None:
        """End the connections that have been idle for too long."""
        loop = asyncio.get_running_loop()
        oldest = loop.time() - IDLE_SECONDS
        while self._idle and self._idle[0][1] <= oldest:
            connection, _ = self._idle.popleft()
            connection.abort()
        self._sweeping = loop.call_at(self._idle[0][1] + IDLE_SECONDS, self._sweep) if self._idle else None
