"""Which errors of the operating system are temporary and which are permanent."""

import errno
import socket
import ssl
from enum import Enum

# A resource is short or a host can't be reached, which may change by itself.
_PASSING = frozenset(
    (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ENOBUFS,
        errno.EAGAIN,
        errno.EINTR,
        errno.EBUSY,
        errno.ESTALE,
        errno.ENOLCK,
        errno.EPIPE,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.ENOTCONN,
        errno.ESHUTDOWN,
        errno.ETIMEDOUT,
        errno.EADDRNOTAVAIL,
    )
)
_FULL = frozenset((errno.ENOSPC, errno.EDQUOT))
_FORBIDDEN = frozenset((errno.EACCES, errno.EPERM, errno.EROFS))


class Verdict(Enum):
    """Whether a failure may pass by itself, so that it is retried, or somebody has to change something."""

    PASSING = "passing"
    PERMANENT = "permanent"


def verdict_of(error: OSError) -> Verdict:
    """Errors without a number, such as timeouts and connections that asyncio lost, are temporary."""
    if isinstance(error, ssl.SSLError):
        # A TLS connection that is cut off raises one of these two; all others concern keys and protocols.
        return Verdict.PASSING if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError) else Verdict.PERMANENT
    if error.errno is None or isinstance(error, TimeoutError | ConnectionError | socket.gaierror):
        return Verdict.PASSING
    return Verdict.PASSING if error.errno in _PASSING else Verdict.PERMANENT


def code_of(error: OSError) -> str | None:
    """The code that callers see for this error, None for the default one."""
    if error.errno in _FULL:
        return "disk_full"
    return "read_only" if error.errno in _FORBIDDEN else None
