"""Reaching a PostgreSQL: what goes wrong is said in words, and what there is to read is listed."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from libs.connectors import registry
from libs.connectors.postgres.config import PostgresSourceConfig
from libs.connectors.postgres.connection import connect
from libs.connectors.protocol import ConnectorRefused, ConnectorUnavailable, Source
from libs.core.errors import DataSyncError
from libs.testing.certificates import Authority
from tests.integration.connectors.moving import EVERY_TYPE, Lake, Server, move, plan_of

SSL_REQUEST = bytes([0, 0, 0, 8, 4, 210, 22, 47])


async def _refusal(config: dict[str, Any]) -> DataSyncError:
    with pytest.raises(DataSyncError) as refusal:
        await registry.open_source("postgres", config).check()
    assert str(config.get("password") or "-") not in str(refusal.value)
    return refusal.value


async def test_a_good_configuration_passes(source: Server) -> None:
    await registry.open_source("postgresql", source.config).check()
    await source.destination().check()
    assert await source.tables() == []


async def test_wrong_credentials_are_named(source: Server) -> None:
    refusal = await _refusal(source.config | {"password": "wrong-secret"})
    assert isinstance(refusal, ConnectorRefused)
    assert "refused the credentials of 'postgres'" in refusal.message


async def test_an_unknown_database_is_named(source: Server) -> None:
    assert "has no database 'nowhere'" in (await _refusal(source.config | {"database": "nowhere"})).message


async def test_an_unknown_schema_is_named(source: Server) -> None:
    assert "no schema 'nowhere'" in (await _refusal(source.config | {"schemas": ["public", "nowhere"]})).message


async def test_a_refused_connection_says_so(source: Server, unused_tcp_port: int) -> None:
    refusal = await _refusal(source.config | {"port": unused_tcp_port})
    assert isinstance(refusal, ConnectorUnavailable)
    assert "refused the connection" in refusal.message


async def test_an_unknown_host_says_so(source: Server) -> None:
    assert "nowhere.invalid is not known" in (await _refusal(source.config | {"host": "nowhere.invalid"})).message


async def test_a_server_that_vanishes_without_a_word_is_noticed(source: Server) -> None:
    """The operating system probes connections on which nothing comes."""
    config = PostgresSourceConfig.model_validate(source.config)
    connection = await connect(config, application_name="test")
    try:
        opened = connection._transport.get_extra_info("socket")  # type: ignore[attr-defined]
        assert opened.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60
    finally:
        await connection.close()


async def test_a_host_that_hangs_is_given_up_in_time(source: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("libs.connectors.postgres.connection.CONNECT_TIMEOUT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as never_accepting:
        refusal = await _refusal(source.config | {"port": never_accepting.getsockname()[1]})
    assert isinstance(refusal, ConnectorUnavailable)
    assert "did not answer within 0.3 s" in refusal.message


@pytest.mark.parametrize(
    "host", ["169.254.169.254", "2852039166", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1"]
)
async def test_metadata_services_are_refused(source: Server, host: str) -> None:
    assert "metadata services are refused" in (await _refusal(source.config | {"host": host})).message


async def test_a_name_is_looked_up_once_and_its_judged_address_connected_to(
    source: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever controls the name can not have another address connected to than the one that was judged."""
    loop, answers = asyncio.get_running_loop(), iter(["127.0.0.1", "169.254.169.254"])
    connected: list[str] = []
    resolve, connect_to = loop.getaddrinfo, loop.sock_connect

    async def rebinding(host: str, port: int, **options: Any) -> Any:
        return await resolve(next(answers), port, **options)

    async def watched(unconnected: socket.socket, address: Any) -> None:
        connected.append(address[0])
        await connect_to(unconnected, address)

    monkeypatch.setattr(loop, "getaddrinfo", rebinding)
    monkeypatch.setattr(loop, "sock_connect", watched)
    await registry.open_source("postgres", source.config | {"host": "rebound.example"}).check()
    assert connected == ["127.0.0.1"]
    refusal = await _refusal(source.config | {"host": "rebound.example"})
    assert "metadata services are refused" in refusal.message
    assert connected == ["127.0.0.1"]


async def test_a_server_without_tls_is_refused_where_tls_is_required(source: Server) -> None:
    for mode in ("require", "verify-ca", "verify-full"):
        assert "does not offer encrypted" in (await _refusal(source.config | {"ssl": {"mode": mode}})).message
    for mode in ("disable", "allow", "prefer"):
        await registry.open_source("postgres", source.config | {"ssl": {"mode": mode}}).check()


@pytest.mark.parametrize(
    ("answer", "told"), [(b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not answer as PostgreSQL does"), (b"", "at once")]
)
async def test_what_is_no_postgresql_says_so(source: Server, answer: bytes, told: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(8)
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    refusal = await _refusal(source.config | {"host": "127.0.0.1", "port": port, "ssl": {"mode": "prefer"}})
    server.close()
    assert told in refusal.message


async def test_every_tls_mode_does_as_in_libpq(source: Server, tls: "TlsFront") -> None:
    def reading(host: str, **ssl_config: str) -> Source:
        return registry.open_source("postgres", source.config | {"host": host, "port": tls.port, "ssl": ssl_config})

    for mode in ("allow", "prefer", "require"):
        await reading("127.0.0.1", mode=mode).check()
    await reading("127.0.0.1", mode="verify-full", server_ca=tls.authority).check()
    await reading("localhost", mode="verify-ca", server_ca=tls.authority).check()
    for config in (
        {"mode": "verify-full", "server_ca": tls.stranger},
        {"mode": "verify-ca", "server_ca": tls.stranger},
        {"mode": "verify-ca"},
        {"mode": "require", "server_ca": tls.stranger},
    ):
        with pytest.raises(ConnectorRefused, match="can't be verified"):
            await reading("127.0.0.1", **config).check()
    with pytest.raises(ConnectorRefused, match="can't be verified"):
        await reading("localhost", mode="verify-full", server_ca=tls.authority).check()


@pytest.mark.parametrize("mode", ["require", "verify-full"])
async def test_both_drivers_read_over_tls(source: Server, lake: Lake, tls: "TlsFront", mode: str) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    source.overrides |= {"port": tls.port, "ssl": {"mode": mode, "server_ca": tls.authority}}
    assert (await move(source, lake, plan_of("t"))).verified is True
    assert tls.encrypted >= 1


async def test_discovery_lists_tables_views_and_partitioned_tables_with_their_columns(source: Server) -> None:
    await source.execute(EVERY_TYPE)
    await source.execute(
        """
        CREATE SCHEMA sales; CREATE TABLE sales.orders (id int, line int, note text NOT NULL, PRIMARY KEY (line, id));
        CREATE VIEW sales.notes AS SELECT note FROM sales.orders;
        CREATE TABLE sales.parts (id int) PARTITION BY RANGE (id);
        CREATE TABLE sales.parts_1 PARTITION OF sales.parts FOR VALUES FROM (1) TO (10);
        CREATE SCHEMA _datasync;
        CREATE TABLE _datasync._datasync_state (job_id int, epoch int, run_id int, taken_at int);
        """
    )
    found = [entry["stream"] for entry in await registry.open_source("postgres", source.config).discover()]
    assert [(stream["namespace"], stream["name"]) for stream in found] == [
        ("public", "everything"),
        ("sales", "notes"),
        ("sales", "orders"),
        ("sales", "parts"),
    ]
    orders = found[2]
    assert orders["source_defined_primary_key"] == ["line", "id"]
    assert orders["type_schema"]["properties"]["note"]["type"] == ["string"]
    assert orders["supported_sync_modes"] == ["full_refresh", "incremental"]
    assert (orders["destination_database"], orders["destination_table"]) == ("sales", "orders")
    types = {name: column["type"] for name, column in found[0]["type_schema"]["properties"].items()}
    assert types["id"] == ["integer"]
    assert types["exact"] == types["paid"] == ["number", "null"]
    assert types["feeling"] == ["string", "null"]
    assert types["moods"] == ["array", "null"]
    assert types["bin"] == ["object", "null"]
    limited = await registry.open_source("postgres", source.config | {"schemas": ["sales"]}).discover()
    assert {entry["stream"]["namespace"] for entry in limited} == {"sales"}


async def test_discovery_leaves_out_what_the_role_may_not_read(source: Server) -> None:
    role = f"reader_{source.config['database']}"
    await source.execute(
        f"""
        CREATE TABLE open_to_all (id int); CREATE TABLE secret (id int);
        CREATE ROLE {role} LOGIN PASSWORD 'reading'; GRANT SELECT ON open_to_all TO {role};
        """
    )
    try:
        reading = registry.open_source("postgres", source.config | {"username": role, "password": "reading"})
        assert [entry["stream"]["name"] for entry in await reading.discover()] == ["open_to_all"]
    finally:
        await source.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.fixture
def unused_tcp_port() -> int:
    from libs.suite.child_process import free_port  # noqa: PLC0415

    return free_port()


@dataclass
class TlsFront:
    """What stands before the server and speaks TLS for it, as a pooler does; its certificate names 127.0.0.1 alone."""

    backend_port: int
    context: ssl.SSLContext
    authority: str
    stranger: str
    port: int = 0
    encrypted: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            greeting = await reader.readexactly(8)
            if greeting == SSL_REQUEST:
                writer.write(b"S")
                await writer.start_tls(self.context)
                self.encrypted += 1
                greeting = b""
            back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self.backend_port)
            back_writer.write(greeting)
            async with asyncio.TaskGroup() as both:
                both.create_task(_pump(reader, back_writer))
                both.create_task(_pump(back_reader, writer))
        except (OSError, asyncio.IncompleteReadError, ExceptionGroup):
            pass
        finally:
            writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


@pytest.fixture
async def tls(source: Server, tmp_path: Path) -> AsyncIterator[TlsFront]:
    authority = Authority("authority")
    (tmp_path / "server.pem").write_text(authority.certificate())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    front = TlsFront(source.config["port"], context, authority.pem, Authority("stranger").pem)
    async with await asyncio.start_server(front.serve, "127.0.0.1", 0) as listening:
        front.port = listening.sockets[0].getsockname()[1]
        yield front
