"""Programs that we start: they end when we end, and they listen on a port."""

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
    """For ``preexec_fn``: the kernel kills the child when the thread that started it ends (prctl(2)), even by kill -9.

    Does nothing outside Linux.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def free_port(host: str = "127.0.0.1") -> int:
    """A free TCP port below the ephemeral range.

    The kernel could assign an ephemeral port to an outgoing connection before the server listens on it.
    """
    while True:
        port = random.randrange(*_PORTS_FOR_SERVERS)
        if not port_is_taken(host, port):
            return port


def port_is_taken(host: str, port: int) -> bool:
    """Whether listening on the port would fail because it is in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def accepts_connections(host: str, port: int) -> bool:
    """Whether a connection to the port is accepted now."""
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False
