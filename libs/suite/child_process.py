"""What programs that we start have in common: they end with us, and they listen on a port."""

import ctypes
import os
import random
import signal
import socket
import sys

_PR_SET_PDEATHSIG = 1
_PORTS_FOR_SERVERS = (12_000, 32_000)
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent() -> None:
    """For ``preexec_fn``: the kernel kills the child when the thread that started it ends (prctl(2)).

    However it ends, kill -9 included. A no-op outside Linux.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nothing listens on, below those that the kernel gives to outgoing connections.

    One that the kernel picked itself could be given away again before the server that it is meant for listens.
    """
    while True:
        port = random.randrange(*_PORTS_FOR_SERVERS)
        if not port_is_taken(host, port):
            return port


def port_is_taken(host: str, port: int) -> bool:
    """Whether somebody else holds the port, so that listening on it would fail."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def accepts_connections(host: str, port: int) -> bool:
    """Whether somebody answers on the port now."""
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False
