"""Listening sockets that outlive the process that serves them.

The supervisor opens them and hands them down, so that the kernel queues connections while a service comes back, and no
other program can take the port meanwhile.
"""

import errno
import socket
from collections.abc import Sequence

BACKLOG = 1024


class PortTaken(Exception):
    """Another process listens on the port."""


class Listeners:
    """The listening sockets of one service, one for each address of its host; closed until ``open``.

    Args:
        host: a name or an address.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._sockets: list[socket.socket] = []

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The file descriptors that a child process inherits."""
        return tuple(listening.fileno() for listening in self._sockets)

    def open(self) -> None:
        """Listen, unless already listening.

        Raises:
            PortTaken: another program holds the port.
            OSError: the host has no address here.
        """
        if self._sockets:
            return
        try:
            for family, address in _addresses(self._host, self._port):
                self._sockets.append(_listening(family, address))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Refuse connections from now on; queued ones are reset, unless a child still serves the sockets."""
        for listening in self._sockets:
            listening.close()
        self._sockets.clear()


def inherited(descriptors: Sequence[int]) -> list[socket.socket]:
    """The listening sockets that were opened by the process that started this one.

    Raises:
        OSError: a descriptor is no socket.
    """
    return [socket.socket(fileno=descriptor) for descriptor in descriptors]


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, object]]:
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _listening(family: socket.AddressFamily, address: object) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(address)  # type: ignore[arg-type]
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(str(error)) from None
        raise
    return listening
