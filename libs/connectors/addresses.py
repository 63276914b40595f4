"""Connections to hosts that users enter: a host is looked up once, and the addresses that were checked are used.

If the name were looked up again to connect, another address might come back (DNS rebinding).
"""

import asyncio
import socket
from typing import Any

from libs.connectors.protocol import ConnectorRefused
from libs.core.addresses import is_metadata_address, parse_address


class CheckedLoop:
    """The running event loop for a client library; refuses to connect to forbidden addresses.

    The metadata services of clouds serve credentials, so nothing is sent to them.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    async def create_connection(
        self, protocol_factory: Any, host: str, port: int, **options: Any
    ) -> tuple[asyncio.Transport, Any]:
        """Like the loop's own method, with the checked addresses of ``host`` in order.

        Raises:
            ConnectorRefused: one of the host's addresses may not be called.
            OSError: the host is not known, or none of its addresses can be connected to.
        """
        connected = await self._connect(host, port)
        if options.get("ssl") is not None:
            options.setdefault("server_hostname", host)
        try:
            transport, protocol = await self._loop.create_connection(protocol_factory, sock=connected, **options)
        except BaseException:
            connected.close()
            raise
        return transport, protocol

    async def _connect(self, host: str, port: int) -> socket.socket:
        found = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if any(is_metadata_address(parse_address(str(address[0]))) for *_, address in found):
            raise ConnectorRefused(f"host {host}: addresses of metadata services are refused", code="address_refused")
        errors: list[OSError] = []
        for family, kind, protocol_number, _, address in found:
            try:
                return await self._connect_to(socket.socket(family, kind, protocol_number), address)
            except OSError as error:
                errors.append(error)
        raise errors[0]

    async def _connect_to(self, unconnected: socket.socket, address: Any) -> socket.socket:
        unconnected.setblocking(False)
        try:
            await self._loop.sock_connect(unconnected, address)
        except BaseException:
            unconnected.close()
            raise
        return unconnected
