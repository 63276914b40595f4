"""Connections to a PostgreSQL: TLS as libpq has it, time-outs, and errors in words for the person who configured it."""

import asyncio
import contextlib
import socket
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg

from libs.connectors.addresses import refuse_metadata_address
from libs.connectors.postgres.config import CONNECTION_PARAMETERS, PostgresConfig, SslConfig
from libs.connectors.protocol import ConnectorRefused, ConnectorUnavailable
from libs.core.errors import DataSyncError

CONNECT_TIMEOUT_SECONDS = 10.0
RETRY_PAUSE_SECONDS = 1.0
KEEPALIVE_IDLE_SECONDS = 30
KEEPALIVE_INTERVAL_SECONDS = 10
KEEPALIVE_PROBES_MAX = 3

# One rendering of every value on both ends, and no time-out that would end a long copy.
SESSION_SETTINGS = {
    "timezone": "UTC",
    "datestyle": "ISO, YMD",
    "intervalstyle": "iso_8601",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "lc_monetary": "C",
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
}

Connection = asyncpg.Connection


async def connect(config: PostgresConfig, *, application_name: str, retries: int = 0) -> "Connection[Any]":
    """Open a connection with the fixed session settings.

    Args:
        application_name: what the server shows in ``pg_stat_activity``.
        retries: how often a server that can't be reached is tried again.

    Raises:
        ConnectorRefused: wrong credentials, unknown database, bad certificates.
        ConnectorUnavailable: refused, unknown host, no answer in time.
    """
    await refuse_metadata_address(config.host, config.port, timeout_seconds=CONNECT_TIMEOUT_SECONDS)
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
    settings = SESSION_SETTINGS | {"application_name": application_name} | _parameters(config)
    try:
        connection = await asyncpg.connect(
            host=config.host,
            port=config.port,
            user=config.username,
            password=config.password,
            database=config.database,
            ssl=ssl_argument(config.ssl),
            timeout=CONNECT_TIMEOUT_SECONDS,
            server_settings=settings,
            statement_cache_size=0,
        )
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
        raise connecting_failed(error, config) from None
    _probe_when_silent(connection)
    return connection


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
        case asyncpg.InvalidPasswordError() | asyncpg.InvalidAuthorizationSpecificationError():
            return ConnectorRefused(f"{where} refused the credentials of {config.username!r}: {error}")
        case asyncpg.InvalidCatalogNameError():
            return ConnectorRefused(f"{where} has no database {config.database!r}")
        case ssl.SSLCertVerificationError():
            return ConnectorRefused(f"the certificate of {where} can't be verified: {error.verify_message}")
        case ssl.SSLError():
            return ConnectorRefused(f"no encrypted connection to {where}: {error.reason or error}")
        case ConnectionRefusedError():
            return ConnectorUnavailable(f"{where} refused the connection: is it running, and is the port right?")
        case ConnectionError() if "SSL" in str(error) and config.ssl.mode in ("disable", "allow", "prefer"):
            # Its refusal would have been accepted, so this was none.
            return ConnectorRefused(f"{where} does not answer as PostgreSQL does: is the port right?")
        case ConnectionError() if "SSL" in str(error):
            mode = config.ssl.mode
            return ConnectorRefused(f"{where} does not offer encrypted connections, which ssl mode {mode} needs")
        case ConnectionError() if "connection_lost" in str(error):
            return ConnectorUnavailable(f"{where} ended the connection at once: is it PostgreSQL, and is it running?")
        case OSError():
            return ConnectorUnavailable(f"{where} can't be reached: {error.strerror or error}")
        case asyncpg.PostgresError():
            return ConnectorUnavailable(f"{where} did not accept the connection: {error}")
        case _:
            return ConnectorRefused(f"{where}: {error}")


@contextlib.contextmanager
def translated(where: str) -> Iterator[None]:
    """Turn the driver's errors into ``ConnectorRefused`` or ``ConnectorUnavailable`` that say where they happened."""
    try:
        yield
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        raise failure(error, where) from error


def failure(error: BaseException, where: str) -> DataSyncError:
    """The driver's error by what the caller can do about it (PostgreSQL documentation, appendix A)."""
    state = getattr(error, "sqlstate", None) or ""
    match state:
        case "53100":
            return ConnectorUnavailable(f"{where}: the disk is full: {error}", code="disk_full")
        case "25006":
            return ConnectorRefused(f"{where} is read-only: {error}", code="read_only")
        case "42501":
            return ConnectorRefused(f"{where}: permission denied: {error}", code="permission_denied")
        case "42P01" | "3F000":
            return ConnectorRefused(f"{where}: {error}", code="table_missing")
    if not state or state[:2] in {"08", "40", "53", "55", "57", "58"} or state == "72000":
        return ConnectorUnavailable(f"{where} broke off: {str(error) or type(error).__name__}")
    detail = f" ({error.detail})" if isinstance(error, asyncpg.PostgresError) and error.detail else ""
    return ConnectorRefused(f"{where}: {error}{detail}")


def ssl_argument(config: SslConfig) -> Any:
    """asyncpg's ``ssl``: the mode's name where libpq's defaults do, a context where certificates were typed in."""
    match config.mode:
        case "disable":
            return False
        case "allow" | "prefer" if not config.client_cert:
            return config.mode
        case "require" if not config.server_ca and not config.client_cert:
            return config.mode
    context = ssl.create_default_context(cadata=config.server_ca or None)
    # "require" with a root certificate verifies it, for compatibility with old versions of libpq (section 34.19.1).
    verify = config.mode in {"verify-ca", "verify-full"} or (config.mode == "require" and bool(config.server_ca))
    context.check_hostname = config.mode == "verify-full"
    context.verify_mode = ssl.CERT_REQUIRED if verify else ssl.CERT_NONE
    if config.client_cert:
        with tempfile.TemporaryDirectory() as folder:
            certificate, key = Path(folder, "client.crt"), Path(folder, "client.key")
            certificate.write_text(config.client_cert)
            key.touch(mode=0o600)
            key.write_text(config.client_key)
            context.load_cert_chain(certificate, key)
    return context


def quoted(*names: str) -> str:
    """An identifier, qualified when several names are given, quoted."""
    return ".".join('"' + name.replace('"', '""') + '"' for name in names)


def literal(text: str) -> str:
    """A text as an SQL literal, for statements that take no parameters."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"E'{escaped}'"


def _parameters(config: PostgresConfig) -> dict[str, str]:
    return {CONNECTION_PARAMETERS[name]: value for name, value in config.jdbc_url_params.items()}
