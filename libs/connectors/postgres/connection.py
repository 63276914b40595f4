"""Connections to a PostgreSQL: TLS as libpq has it, time-outs, and one reading of every value on both ends."""

import asyncio
import contextlib
import socket
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import asyncpg

from libs.connectors.addresses import CheckedLoop
from libs.connectors.failures import Verdict
from libs.connectors.postgres.config import CONNECTION_PARAMETERS, PostgresConfig, SslConfig
from libs.connectors.postgres.failures import failure, meaning_of, message_of
from libs.connectors.protocol import ConnectorRefused, ConnectorUnavailable
from libs.core.errors import DataSyncError

CONNECT_TIMEOUT_SECONDS = 10.0
CLOSE_TIMEOUT_SECONDS = 2.0
RETRY_PAUSE_SECONDS = 1.0
KEEPALIVE_IDLE_SECONDS = 30
KEEPALIVE_INTERVAL_SECONDS = 10
KEEPALIVE_PROBES_MAX = 3

# Every setting by which the text of a value, or how a text is read, may differ between two sessions, so that what a
# role, a database or a server was set to changes nothing on either end. Left out on purpose: lc_time and lc_numeric,
# which no type's text depends on (only ``to_char``), and client_encoding, which the driver sets.
_ONE_READING_OF_VALUES = {
    "timezone": "UTC",
    "timezone_abbreviations": "Default",
    "datestyle": "ISO, YMD",
    "intervalstyle": "iso_8601",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "lc_monetary": "C",
    "array_nulls": "on",
    "xmloption": "content",
    "xmlbinary": "base64",
    "quote_all_identifiers": "off",
}
# What statements mean. Without a search path names are qualified in texts, and nobody's function stands in for
# PostgreSQL's own.
_ONE_READING_OF_STATEMENTS = {
    "search_path": "",
    "standard_conforming_strings": "on",
    "backslash_quote": "safe_encoding",
    "escape_string_warning": "off",
    "transform_null_equals": "off",
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
}
# A copy may take long, and waits where it says so itself.
_NO_TIMEOUTS = {"statement_timeout": "0", "lock_timeout": "0", "idle_in_transaction_session_timeout": "0"}
SESSION_SETTINGS = (
    _ONE_READING_OF_VALUES
    | _ONE_READING_OF_STATEMENTS
    | _NO_TIMEOUTS
    # A policy is never applied in silence: the server refuses to read or write what it would filter.
    | {"row_security": "off"}
)
# Time-outs that older servers do not know, by the version that has them.
_NO_TIMEOUTS_SINCE = {14: "idle_session_timeout", 17: "transaction_timeout"}

Connection = asyncpg.Connection
# The driver's internal error is of a connection that broke in the middle of something.
DRIVER_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)


async def connect(config: PostgresConfig, *, application_name: str, retries: int = 0) -> "Connection[Any]":
    """Open a connection with the fixed session settings; nothing of the environment or the home folder is read.

    Args:
        application_name: what the server shows in ``pg_stat_activity``.
        retries: how often a server that can't be reached is tried again.

    Raises:
        ConnectorRefused: wrong credentials, unknown database, bad certificates, an address that may not be called.
        ConnectorUnavailable: refused, unknown host, no answer in time.
    """
    attempt = 0
    while True:
        try:
            return await _connect_once(config, application_name)
        except ConnectorUnavailable:
            if attempt >= retries:
                raise
            attempt += 1
            await asyncio.sleep(RETRY_PAUSE_SECONDS * attempt)


async def _connect_once(config: PostgresConfig, application_name: str) -> "Connection[Any]":
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
            connection = await _connect_as_preferred(config, application_name)
            for version, name in _NO_TIMEOUTS_SINCE.items():
                if connection.get_server_version() >= (version,):
                    await connection.execute(f"SET {name} = 0")
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, ValueError) as error:
        raise connecting_failed(error, config) from None
    _probe_when_silent(connection)
    return connection


async def _connect_as_preferred(config: PostgresConfig, application_name: str) -> "Connection[Any]":
    """Try what the TLS mode prefers, and then, where it allows another way, that (libpq, section 34.19.3)."""
    first, *others = tls_ways(config.ssl)
    try:
        return await _open(config, application_name, first)
    except (ssl.SSLError, ConnectionError, asyncpg.InvalidAuthorizationSpecificationError) as error:
        # A refused connection and a wrong password are the same either way.
        if not others or isinstance(error, ConnectionRefusedError | asyncpg.InvalidPasswordError):
            raise
        try:
            return await _open(config, application_name, others[0])
        except (asyncpg.ConnectionDoesNotExistError, asyncpg.InternalClientError):
            # What hangs up either way is known best by its first answer.
            raise error from None


async def _open(config: PostgresConfig, application_name: str, tls: ssl.SSLContext | None) -> "Connection[Any]":
    settings = SESSION_SETTINGS | config.session_settings() | {"application_name": application_name}
    # Everything is given: the driver looks for what is missing in PG* variables, ~/.pgpass and ~/.postgresql.
    return await asyncpg.connect(
        host=config.host,
        port=config.port,
        user=config.username,
        password=config.password,
        database=config.database,
        ssl=tls or False,
        direct_tls=False,
        target_session_attrs=asyncpg.connect_utils.SessionAttribute.any,
        krbsrvname="postgres",
        gsslib="gssapi",
        timeout=CONNECT_TIMEOUT_SECONDS,
        server_settings=settings | _parameters(config),
        statement_cache_size=0,
        loop=cast(asyncio.AbstractEventLoop, CheckedLoop()),
    )


def _probe_when_silent(connection: "Connection[Any]") -> None:
    """Notice a server that vanished without a word, which a copy would wait for without end."""
    # asyncpg offers no other way to its socket.
    probed: socket.socket = connection._transport.get_extra_info("socket")  # type: ignore[attr-defined]
    probed.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_SECONDS),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_SECONDS),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES_MAX),
    ):
        if hasattr(socket, option):
            probed.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def connecting_failed(error: BaseException, config: PostgresConfig) -> DataSyncError:
    """What went wrong while connecting, in words; never with the password."""
    where = f"PostgreSQL at {config.host}:{config.port}"
    match error:
        case TimeoutError():
            return ConnectorUnavailable(f"{where} did not answer within {CONNECT_TIMEOUT_SECONDS:g} s", code="timeout")
        case socket.gaierror():
            return ConnectorUnavailable(f"the host {config.host} is not known: {error.strerror or error}")
        case ssl.SSLCertVerificationError():
            return ConnectorRefused(f"the certificate of {where} can't be verified: {error.verify_message}")
        case ssl.SSLError():
            words = f"no encrypted connection to {where}: {getattr(error, 'reason', None) or error}"
        case asyncpg.InvalidAuthorizationSpecificationError():
            words = f"{where} refused the credentials of {config.username!r}: {message_of(error)}"
        case asyncpg.InvalidCatalogNameError():
            words = f"{where} has no database {config.database!r}"
        case ConnectionRefusedError():
            words = f"{where} refused the connection: is it running, and is the port right?"
        case ConnectionError() if "SSL" in str(error) and config.ssl.mode in ("disable", "allow", "prefer"):
            # Its refusal would have been accepted, so this was none.
            return ConnectorRefused(f"{where} does not answer as PostgreSQL does: is the port right?")
        case ConnectionError() if "SSL" in str(error):
            mode = config.ssl.mode
            return ConnectorRefused(f"{where} does not offer encrypted connections, which ssl mode {mode} needs")
        case ConnectionError() if "connection_lost" in str(error):
            words = f"{where} ended the connection at once: is it PostgreSQL, and is it running?"
        case OSError():
            words = f"{where} can't be reached: {error.strerror or error}"
        case asyncpg.PostgresError():
            words = f"{where} did not accept the connection: {message_of(error)}"
        case _:
            words = f"{where}: {error}"
    meaning = meaning_of(error)
    if meaning.verdict is Verdict.PERMANENT:
        return ConnectorRefused(words, code=meaning.code)
    return ConnectorUnavailable(words, code=meaning.code)


@contextlib.contextmanager
def translated(where: str) -> Iterator[None]:
    """Turn the driver's errors into ``ConnectorRefused`` or ``ConnectorUnavailable`` that say where they happened."""
    try:
        yield
    except DRIVER_ERRORS as error:
        raise failure(error, where) from error


def tls_ways(config: SslConfig) -> list[ssl.SSLContext | None]:
    """How to connect, the preferred way first: with this context, or unencrypted."""
    match config.mode:
        case "disable":
            return [None]
        case "allow":
            return [None, _tls_context(config)]
        case "prefer":
            return [_tls_context(config), None]
        case _:
            return [_tls_context(config)]


def _tls_context(config: SslConfig) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["postgresql"])
    # "require" with a root certificate verifies it, for compatibility with old versions of libpq (section 34.19.1).
    verify = config.mode in {"verify-ca", "verify-full"} or (config.mode == "require" and bool(config.server_ca))
    context.check_hostname = config.mode == "verify-full"
    context.verify_mode = ssl.CERT_REQUIRED if verify else ssl.CERT_NONE
    if config.server_ca:
        context.load_verify_locations(cadata=config.server_ca)
    elif verify:
        context.load_default_certs()
    if config.client_cert:
        with tempfile.TemporaryDirectory() as folder:
            certificate, key = Path(folder, "client.crt"), Path(folder, "client.key")
            certificate.write_text(config.client_cert)
            key.touch(mode=0o600)
            key.write_text(config.client_key)
            context.load_cert_chain(certificate, key)
    return context


async def close(connection: "Connection[Any]") -> None:
    """Close in bounded time, whatever state the connection is in."""
    try:
        await connection.close(timeout=CLOSE_TIMEOUT_SECONDS)
    except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
        connection.terminate()


def quoted(*names: str) -> str:
    """An identifier, qualified when several names are given, quoted."""
    return ".".join('"' + name.replace('"', '""') + '"' for name in names)


def literal(text: str) -> str:
    """A text as an SQL literal, for statements that take no parameters."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"E'{escaped}'"


def _parameters(config: PostgresConfig) -> dict[str, str]:
    return {CONNECTION_PARAMETERS[name]: value for name, value in config.jdbc_url_params.items()}
