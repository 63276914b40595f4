"""What the operating system's errors mean for whoever waits: whether the same may work later."""

import errno
import socket
import ssl
from enum import Enum

# The disk, the network or the machine is short of something or out of reach; that may be over in a moment.
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
    """What to do about a failure: try the same again later, or tell somebody who has to change something."""

    PASSING = "passing"
    PERMANENT = "permanent"


def verdict_of(error: OSError) -> Verdict:
    """Errors without a number, such as a time-out or a connection that asyncio lost, pass."""
    if isinstance(error, ssl.SSLError):
        # An encrypted connection that is cut off ends in one of these two; all else is about keys and protocols.
        return Verdict.PASSING if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError) else Verdict.PERMANENT
    if error.errno is None or isinstance(error, TimeoutError | ConnectionError | socket.gaierror):
        return Verdict.PASSING
    return Verdict.PASSING if error.errno in _PASSING else Verdict.PERMANENT


def code_of(error: OSError) -> str | None:
    """The code of an error that callers know by name."""
    if error.errno in _FULL:
        return "disk_full"
    return "read_only" if error.errno in _FORBIDDEN else None
