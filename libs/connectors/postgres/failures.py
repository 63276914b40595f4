"""What PostgreSQL's errors mean: temporary or permanent, the code, and words for people.

One table decides for connecting, reading and writing alike. A permanent failure is never tried again. The SQLSTATEs are
those of the PostgreSQL documentation, appendix A.
"""

import re
from dataclasses import dataclass

import asyncpg

from libs.connectors.failures import Verdict, code_of, verdict_of
from libs.connectors.protocol import ConnectorRefused, ConnectorUnavailable

PASSING, PERMANENT = Verdict.PASSING, Verdict.PERMANENT


@dataclass(frozen=True, slots=True)
class Meaning:
    """What an SQLSTATE means.

    Args:
        code: that callers know the failure by; the verdict's own when absent.
        words: said after where it happened, before PostgreSQL's own message.
    """

    verdict: Verdict
    code: str | None = None
    words: str = ""


# By class; classes that are not listed are permanent.
_CLASSES = {
    "08": Meaning(PASSING),  # connection exception
    "40": Meaning(PASSING),  # transaction rollback: deadlocks, serialization, conflicts with recovery
    "53": Meaning(PASSING),  # insufficient resources
    "57": Meaning(PASSING),  # operator intervention
    "58": Meaning(PASSING),  # system error
    "XX": Meaning(PASSING),  # internal error: most are about something that was changed at the same moment
}
_STATES = {
    "08P01": Meaning(PERMANENT),  # protocol violation: it is no PostgreSQL, or a pooler that knows no such setting
    "25006": Meaning(PERMANENT, "read_only", " is read-only"),
    "25P03": Meaning(PASSING),  # idle in transaction for too long
    "25P04": Meaning(PASSING),  # transaction for too long
    "28000": Meaning(PERMANENT, "credentials_refused"),
    "28P01": Meaning(PERMANENT, "credentials_refused"),
    "3D000": Meaning(PERMANENT, "database_missing"),
    "3F000": Meaning(PERMANENT, "table_missing"),
    "42501": Meaning(PERMANENT, "permission_denied", ": permission denied"),
    "42703": Meaning(PERMANENT, "column_missing"),
    "42P01": Meaning(PERMANENT, "table_missing"),
    "53100": Meaning(PASSING, "disk_full", ": the disk is full"),
    "53300": Meaning(PASSING, "too_many_connections", ": too many connections"),
    "53400": Meaning(PERMANENT, "limit_exceeded"),  # a configured limit, such as temp_file_limit
    "55000": Meaning(PERMANENT, "not_ready"),  # such as a materialised view that was never populated
    "55006": Meaning(PASSING, "in_use"),
    "55P03": Meaning(PASSING, "locked"),
    "57P04": Meaning(PERMANENT, "database_missing"),  # the database was dropped
    "58P01": Meaning(PERMANENT),  # a file of the server is missing, such as a library
    "58P02": Meaning(PERMANENT),
    "72000": Meaning(PASSING),  # snapshot too old
    "HV00N": Meaning(PASSING),  # a foreign server can't be reached
    "XX001": Meaning(PERMANENT, "data_corrupted"),
    "XX002": Meaning(PERMANENT, "data_corrupted"),
}
# Errors of the driver itself that are permanent.
_DRIVERS_PERMANENT = (ValueError, asyncpg.UnsupportedClientFeatureError, asyncpg.UnsupportedServerFeatureError)
_ROW_SECURITY_CHECK = "check_enable_rls"

# The place of an error, without the values there.
_WITHOUT_VALUES = (
    re.compile(r"^COPY .+?, line \d+(?:, column .+?)?(?=: |$)"),
    re.compile(r"^PL/\w+ function .+ line \d+ at [\w /]+$"),
    re.compile(r'^SQL function ".+" (?:statement \d+|during \w+)$'),
    re.compile(r"^JSON data, line \d+(?=: )"),
)
_KEY_VALUES = re.compile(r"(?<=\))=\(.*\)(?= )", re.DOTALL)
# Data exceptions, violated constraints and errors raised by functions, whose details show rows.
_DETAILS_SHOW_VALUES = ("22", "23", "P0")


def meaning_of(error: BaseException) -> Meaning:
    """What an error of PostgreSQL, the driver or the operating system means."""
    state = sqlstate_of(error)
    if state:
        return _STATES.get(state) or _CLASSES.get(state[:2]) or Meaning(PERMANENT)
    if isinstance(error, OSError):
        return Meaning(verdict_of(error), code_of(error))
    return Meaning(PERMANENT if isinstance(error, _DRIVERS_PERMANENT) else PASSING)


def failure(error: BaseException, where: str) -> ConnectorRefused | ConnectorUnavailable:
    """The error by what the caller can do about it.

    Args:
        where: what was done to what; the sentence begins with it.
    """
    if hidden_by_row_security(error):
        return ConnectorRefused(
            f"{where}: row-level security would leave out rows ({message_of(error)}); use a role that owns the table "
            "(without FORCE ROW LEVEL SECURITY) or has BYPASSRLS",
            code="row_security",
        )
    meaning = meaning_of(error)
    told = message_of(error)
    if meaning.verdict is PERMANENT:
        return ConnectorRefused(f"{where}{meaning.words}: {told}", code=meaning.code)
    words = meaning.words or ("" if meaning.code else " broke off")
    return ConnectorUnavailable(f"{where}{words}: {told}", code=meaning.code)


def hidden_by_row_security(error: BaseException) -> bool:
    """Whether the server refused because ``row_security`` is off; told by its function, as messages are translated."""
    return getattr(error, "server_source_function", None) == _ROW_SECURITY_CHECK


def sqlstate_of(error: BaseException) -> str:
    return (getattr(error, "sqlstate", None) or "") if isinstance(error, asyncpg.PostgresError) else ""


def message_of(error: BaseException) -> str:
    """PostgreSQL's message with its detail, hint and context, each once, without the values of rows."""
    if not isinstance(error, asyncpg.PostgresError):
        return str(error) or type(error).__name__
    message = str(error.args[0]) if error.args else type(error).__name__
    told = (_detail(error), _hint(error), _context(error))
    return "; ".join([message, *(part for part in told if part and part not in message)])


def _detail(error: asyncpg.PostgresError) -> str:
    detail = (error.detail or "").strip()
    if not sqlstate_of(error).startswith(_DETAILS_SHOW_VALUES):
        return detail
    shown, replaced = _KEY_VALUES.subn("", detail, count=1)
    return shown if replaced else ""


def _hint(error: asyncpg.PostgresError) -> str:
    """Without hints to use CASCADE, which drops what others made."""
    hint = (error.hint or "").strip()
    return "" if "CASCADE" in hint or sqlstate_of(error).startswith("P0") else hint


def _context(error: asyncpg.PostgresError) -> str:
    lines = (getattr(error, "context", None) or "").splitlines()
    found = [match[0] for line in lines for pattern in _WITHOUT_VALUES if (match := pattern.match(line))]
    return "; ".join(found)
