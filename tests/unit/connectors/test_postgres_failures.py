"""Permanent or passing: one table decides, and what is told names the place and not the row."""

import errno
import ssl
from typing import Any

import asyncpg
import pytest

from libs.connectors.postgres.config import PostgresConfig
from libs.connectors.postgres.connection import connecting_failed
from libs.connectors.postgres.failures import failure, message_of
from libs.connectors.protocol import ConnectorRefused, ConnectorUnavailable

CONFIG = PostgresConfig(host="db", port=5432, database="shop", username="reader", password="secret")


def _error(sqlstate: str, message: str = "told", **fields: str) -> asyncpg.PostgresError:
    codes = {"detail": "D", "hint": "H", "context": "W", "function": "R"}
    sent = {"C": sqlstate, "M": message} | {codes[name]: text for name, text in fields.items()}
    error: asyncpg.PostgresError = asyncpg.PostgresError.new(sent)
    return error


@pytest.mark.parametrize(
    "sqlstate",
    [
        *("42501", "42703", "42P01", "3F000", "42883", "55000", "25006", "22P02", "23505", "28P01", "28000", "3D000"),
        *("53400", "57P04", "0A000", "XX001", "08P01", "54000", "P0001", "99999"),
    ],
)
def test_what_somebody_has_to_change_is_permanent(sqlstate: str) -> None:
    assert isinstance(failure(_error(sqlstate), "it"), ConnectorRefused)
    assert isinstance(connecting_failed(_error(sqlstate), CONFIG), ConnectorRefused)


@pytest.mark.parametrize(
    "sqlstate",
    [
        *("08006", "08001", "40001", "40P01", "53100", "53200", "53300", "55006", "55P03", "57014", "57P01", "57P02"),
        *("57P03", "58030", "25P03", "72000", "XX000"),
    ],
)
def test_what_may_be_over_in_a_moment_passes(sqlstate: str) -> None:
    assert isinstance(failure(_error(sqlstate), "it"), ConnectorUnavailable)
    assert isinstance(connecting_failed(_error(sqlstate), CONFIG), ConnectorUnavailable)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        *((OSError(number, "told"), ConnectorRefused) for number in (errno.EACCES, errno.EROFS, errno.ENOENT)),
        *((OSError(number, "told"), ConnectorUnavailable) for number in (errno.ENOSPC, errno.ECONNRESET, errno.EIO)),
        (TimeoutError(errno.ETIMEDOUT, "told"), ConnectorUnavailable),
        (ConnectionError("lost"), ConnectorUnavailable),
        (ssl.SSLError(1, "wrong version number"), ConnectorRefused),
        (ssl.SSLEOFError(8, "cut off"), ConnectorUnavailable),
        (asyncpg.InterfaceError("connection is closed"), ConnectorUnavailable),
        (ValueError("out of range"), ConnectorRefused),
    ],
)
def test_errors_of_the_system_and_the_driver_are_decided_alike(error: Exception, kind: type[Exception]) -> None:
    assert isinstance(failure(error, "it"), kind)
    assert isinstance(connecting_failed(error, CONFIG), kind)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"sqlstate": "22P02", "message": "bad", "context": 'COPY t, line 3, column odd: one: "secret"'},
            "bad; COPY t, line 3, column odd",
        ),
        ({"sqlstate": "22P04", "message": "bad", "context": 'COPY t, line 3: "secret\tsecret"'}, "bad; COPY t, line 3"),
        (
            {"sqlstate": "22P04", "message": "bad", "context": "COPY t, line 3, column a"},
            "bad; COPY t, line 3, column a",
        ),
        (
            {"sqlstate": "23505", "message": "not unique", "detail": "Key (a, b)=(secret, 2) already exists."},
            "not unique; Key (a, b) already exists.",
        ),
        ({"sqlstate": "23502", "message": "null", "detail": "Failing row contains (secret)."}, "null"),
        (
            {
                "sqlstate": "P0001",
                "message": "raised",
                "detail": "secret",
                "hint": "secret",
                "context": "PL/pgSQL function f(integer) line 3 at RAISE\nSQL statement \"SELECT 'secret'\"",
            },
            "raised; PL/pgSQL function f(integer) line 3 at RAISE",
        ),
        (
            {"sqlstate": "2BP01", "message": "held", "detail": "view v depends on table t", "hint": "Use … CASCADE."},
            "held; view v depends on table t",
        ),
        (
            {"sqlstate": "55000", "message": "not populated", "hint": "Use the REFRESH command."},
            "not populated; Use the REFRESH command.",
        ),
    ],
)
def test_a_message_says_each_thing_once_and_no_value(fields: dict[str, Any], told: str) -> None:
    error = _error(**fields)
    assert message_of(error) == told
    assert failure(error, "it").message.count(told) == 1
    assert "secret" not in failure(error, "it").message


def test_a_refusal_by_row_security_names_the_ways_out() -> None:
    refused = failure(_error("42501", 'query would be affected by … table "t"', function="check_enable_rls"), "it")
    assert refused.code == "row_security"
    assert "BYPASSRLS" in refused.message
