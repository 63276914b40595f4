"""Errors of the file system as errors of the connector, in words."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from libs.connectors.failures import Verdict, code_of, verdict_of
from libs.connectors.protocol import ConnectorRefused, ConnectorUnavailable
from libs.core.errors import first_error


@contextlib.contextmanager
def translated(root: Path) -> Iterator[None]:
    """Turn an ``OSError``, also from a task group, into ``ConnectorRefused`` or ``ConnectorUnavailable``."""
    try:
        yield
    except BaseExceptionGroup as group:
        error = first_error(group)
        raise (_failure(error, root) if isinstance(error, OSError) else error) from group
    except OSError as error:
        raise _failure(error, root) from error


def _failure(error: OSError, root: Path) -> ConnectorRefused | ConnectorUnavailable:
    code = code_of(error)
    match code:
        case "disk_full":
            message = f"no space is left in {root}"
        case "read_only":
            message = f"{root} can't be written to: {error.strerror}"
        case _ if verdict_of(error) is Verdict.PERMANENT:
            message = f"{root} can't be used: {error.strerror} ({error.filename})"
        case _:
            message = f"writing to {root} failed: {error.strerror or error}"
    kind = ConnectorRefused if verdict_of(error) is Verdict.PERMANENT else ConnectorUnavailable
    return kind(message, code=code)
