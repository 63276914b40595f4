"""A TCP proxy that cuts a connection at a chosen moment, for any server on this machine."""

import socket
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Lock, Thread
from typing import Self

CHUNK_BYTES = 64 * 1024
REPLY_SECONDS_MAX = 10.0


class CuttingProxy:
    """Forwards connections to a server until a client sends something that a test chose.

    Its threads need no event loop, so it serves blocking and asynchronous clients.

    Args:
        server_port: of the server, on 127.0.0.1.
    """

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self.cuts = 0
        self._lock = Lock()
        self._is_due: Callable[[bytes], bool] = lambda _: False
        self._is_delivered = False
        self._stays_away = False
        self._sockets: set[socket.socket] = set()
        self._threads: list[Thread] = []

    def cut_once(self, is_due: Callable[[bytes], bool], *, delivered: bool, stays_away: bool = False) -> None:
        """Cut the connection whose client next sends bytes for which ``is_due`` is true.

        Args:
            is_due: called with each piece of what clients send, as it arrives.
            delivered: whether the server still gets these bytes. If so, the connection is cut when the server replies,
                and the client never sees the reply.
            stays_away: from then on no connection to the server is left, and none can be made.
        """
        with self._lock:
            self._is_due, self._is_delivered, self._stays_away = is_due, delivered, stays_away

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()
        for thread in self._threads:
            thread.join(REPLY_SECONDS_MAX)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._server_port))
            except OSError:
                client.close()
                continue
            with self._lock:
                self._sockets |= {client, server}
            is_cut, has_replied = Event(), Event()
            self._start(self._forward_requests, client, server, is_cut, has_replied)
            self._start(self._forward_replies, client, server, is_cut, has_replied)

    def _forward_requests(
        self, client: socket.socket, server: socket.socket, is_cut: Event, has_replied: Event
    ) -> None:
        with suppress(OSError):
            while data := client.recv(CHUNK_BYTES):
                if self._takes_cut(data):
                    is_cut.set()
                    if self._is_delivered:
                        server.sendall(data)
                        has_replied.wait(REPLY_SECONDS_MAX)
                    if self._stays_away:
                        self._leave()
                    break
                server.sendall(data)
        _close(client, server)

    def _forward_replies(self, client: socket.socket, server: socket.socket, is_cut: Event, has_replied: Event) -> None:
        with suppress(OSError):
            while data := server.recv(CHUNK_BYTES):
                if is_cut.is_set():
                    break
                client.sendall(data)
        has_replied.set()
        _close(client, server)

    def _leave(self) -> None:
        # Closing alone would not wake the thread that accepts connections.
        _close(self._listening)
        with self._lock:
            sockets = list(self._sockets)
        _close(*sockets)

    def _takes_cut(self, data: bytes) -> bool:
        with self._lock:
            is_due = self._is_due(data)
            if is_due:
                self.cuts += 1
                self._is_due = lambda _: False
            return is_due

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = Thread(target=target, args=arguments, name="cutting-proxy", daemon=True)
        self._threads.append(thread)
        thread.start()


def _close(*sockets: socket.socket) -> None:
    for each in sockets:
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()
