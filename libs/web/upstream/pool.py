"""Kept-alive connections to one service, at all of its addresses.

A connection is used again only if nothing can be left on it: the request was sent whole, its response was read to its
end, not one byte came after it, neither side said close, and the caller is still there.
"""

import asyncio
import itertools
import ssl
import time
from collections import deque

from yarl import URL

from libs.web.upstream.endpoints import Address, Endpoints, Resolve, resolved
from libs.web.upstream.exchange import Connection, Exchange, ResponseTimeout
from libs.web.upstream.wire import ResponseBroken, UpstreamRequest

CONNECTIONS_MAX = 256
CONNECT_TIMEOUT_SECONDS = 1.0
IDLE_SECONDS = 20.0
"""Less than the services keep idle connections, so that none is used at the moment when it is closed."""
UNSAFE_IDLE_SECONDS = 4.0
"""What can't be sent again uses no connection that was idle for longer. A service that stops answers requests for some
seconds, and closes each connection with its response, before it closes those that were idle meanwhile."""
HEAD_TIMEOUT_SECONDS = 120.0
FIRST_ATTEMPT_SECONDS = 5.0
"""How long one instance of several may take to begin its response before a repeatable request is sent to another."""


class PoolExhausted(Exception):
    """All connections are in use."""


class ConnectFailed(Exception):
    """The service does not accept connections."""


class ConnectionPool:
    """The connections to one service: at most 256 at a time, idle ones kept for 20 seconds.

    Args:
        urls: scheme, host and port; several, separated by commas, are of several instances.
        waits: a request waits while all connections are in use; else it is rejected at once. Requests that do not wait
            are those that may take long, so that a late response says nothing about an address.
        resolve: looks up the addresses of a host.

    Attributes:
        host: what requests name in their header ``Host``.
    """

    def __init__(self, urls: str, *, waits: bool = True, resolve: Resolve = resolved) -> None:
        parsed = [URL(url) for url in urls.split(",")]
        hosts = [(url.host or "", url.port or 80) for url in parsed]
        self._endpoints = Endpoints(hosts, time.monotonic, resolve)
        self._tls = ssl.create_default_context() if parsed[0].scheme == "https" else None
        self.host = parsed[0].authority
        self._idle: dict[Address, deque[tuple[Connection, float]]] = {}
        self._places = asyncio.Semaphore(CONNECTIONS_MAX)
        self._waits = waits
        self._sweeping: asyncio.TimerHandle | None = None

    def close(self) -> None:
        self._endpoints.close()
        if self._sweeping is not None:
            self._sweeping.cancel()
        for connection, _ in itertools.chain.from_iterable(self._idle.values()):
            connection.transport.close()
        self._idle.clear()

    async def exchange(self, request: UpstreamRequest, timeout_seconds: float = HEAD_TIMEOUT_SECONDS) -> Exchange:
        """Send a request and await the head of its response; the caller closes the exchange.

        A repeatable request is sent again, once, on a new connection and at another address if there is one, if its
        connection ended before any byte of the response: the service may be restarting. So it is if the response does
        not begin within ``FIRST_ATTEMPT_SECONDS`` and the service has other addresses: that instance may hang.

        Raises:
            ConnectFailed: the service rejects connections, or accepts none within a second.
            PoolExhausted: all connections are in use, and this pool does not wait.
            ResponseBroken: the connection ended without a response.
            ResponseTimeout: the response did not begin in time.
        """
        started_at = time.monotonic()
        exchange = await self._begin(request, timeout_seconds)
        hedges = self._waits and request.is_repeatable and self._endpoints.are_several
        first_seconds = min(timeout_seconds, FIRST_ATTEMPT_SECONDS) if hedges else timeout_seconds
        try:
            return await self._sent(exchange, first_seconds, is_last=first_seconds == timeout_seconds)
        except ResponseBroken:
            if not exchange.may_be_repeated:
                raise
            is_silent = False
        except ResponseTimeout:
            if first_seconds == timeout_seconds or not exchange.may_be_repeated:
                raise
            is_silent = True
        first = exchange.address
        left_seconds = max(0.001, timeout_seconds - (time.monotonic() - started_at))
        exchange = await self._begin(request, left_seconds, instead_of=first)
        sent = await self._sent(exchange, left_seconds, is_last=True)
        if is_silent and exchange.address != first:
            # Another instance answered the same request, so it was not the request.
            self._eject(first)
        return sent

    async def fetch(self, request: UpstreamRequest, timeout_seconds: float = HEAD_TIMEOUT_SECONDS) -> tuple[int, bytes]:
        """The status and the whole body of the response; raises as ``exchange``."""
        async with await self.exchange(request, timeout_seconds) as exchange:
            return exchange.status, await exchange.whole()

    async def _sent(self, exchange: Exchange, timeout_seconds: float, *, is_last: bool) -> Exchange:
        address = exchange.address
        try:
            await exchange.send(timeout_seconds)
        except ResponseTimeout:
            exchange.close()
            # A caller whose upload stalls says nothing about the service, nor does a request that may take long.
            if is_last and exchange.was_sent_whole and self._waits:
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
        if self._endpoints.are_several:
            self._drop(address)

    def _drop(self, address: Address) -> None:
        for connection, _ in self._idle.pop(address, ()):
            connection.abort()

    async def _begin(
        self, request: UpstreamRequest, timeout_seconds: float, *, instead_of: Address | None = None
    ) -> Exchange:
        """A connection for the request.

        Args:
            instead_of: the address that the request was sent to without success: another one is preferred, and no kept
                connection is used.
        """
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
            connection = await self._connection(0.0 if instead_of else idle_seconds, instead_of)
        except BaseException:
            self._places.release()
            raise
        return Exchange(connection, request, self._release)

    async def _connection(self, idle_seconds: float, instead_of: Address | None) -> Connection:
        """A connection to the first address that accepts one, kept or new."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
                addresses = await self._endpoints.in_order()
        except (OSError, TimeoutError) as error:
            raise ConnectFailed(str(error)) from error
        if instead_of is not None:
            addresses = sorted(addresses, key=lambda address: address == instead_of)
        failure: Exception | None = None
        for address in addresses:
            kept = self._kept(address, idle_seconds) if idle_seconds else None
            if kept is not None:
                return kept
            try:
                return await self._connect_to(address, CONNECT_TIMEOUT_SECONDS / min(len(addresses), 2))
            except (OSError, TimeoutError) as error:
                self._eject(address)
                failure = error
        raise ConnectFailed(str(failure)) from failure

    def _kept(self, address: Address, idle_seconds: float) -> Connection | None:
        """The connection to an address that was used last, unless it has been idle for longer."""
        oldest = asyncio.get_running_loop().time() - idle_seconds
        idle = self._idle.get(address)
        while idle and idle[-1][1] > oldest:
            connection, _ = idle.pop()
            if connection.is_usable:
                return connection
            connection.abort()
        return None

    async def _connect_to(self, address: Address, timeout_seconds: float) -> Connection:
        host, port = address
        async with asyncio.timeout(timeout_seconds):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: Connection(address, self._forget),
                host,
                port,
                ssl=self._tls,
                server_hostname=self._endpoints.host_of(address) if self._tls else None,
            )
        return connection

    def _release(self, connection: Connection, is_clean: bool) -> None:
        """Keep a connection on which nothing is left, to an address that is still the service's; end any other."""
        self._places.release()
        if not is_clean or not self._endpoints.knows(connection.address):
            connection.abort()
            return
        loop = asyncio.get_running_loop()
        self._idle.setdefault(connection.address, deque()).append((connection, loop.time()))
        if self._sweeping is None:
            self._sweeping = loop.call_later(IDLE_SECONDS, self._sweep)

    def _forget(self, ended: Connection) -> None:
        """Remove a connection that ended while it was idle."""
        idle = self._idle.get(ended.address, ())
        if any(connection is ended for connection, _ in idle):
            self._idle[ended.address] = deque(item for item in idle if item[0] is not ended)

    def _sweep(self) -> None:
        """End the connections that have been idle for too long, and those to addresses that are gone."""
        loop = asyncio.get_running_loop()
        oldest = loop.time() - IDLE_SECONDS
        for address, idle in list(self._idle.items()):
            if not self._endpoints.knows(address):
                self._drop(address)
                continue
            while idle and idle[0][1] <= oldest:
                idle.popleft()[0].abort()
            if not idle:
                del self._idle[address]
        first = min((idle[0][1] for idle in self._idle.values()), default=None)
        self._sweeping = None if first is None else loop.call_at(first + IDLE_SECONDS, self._sweep)
