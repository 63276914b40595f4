"""From one PostgreSQL into another: nothing is lost, nothing is half done."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from libs.connectors import registry
from libs.connectors.postgres.config import PostgresDestinationConfig
from libs.connectors.postgres.connection import connect
from libs.connectors.postgres.copying import copy_part
from libs.connectors.postgres.failures import failure
from libs.connectors.postgres.table import PostgresTable
from libs.connectors.protocol import ConnectorRefused, ConnectorUnavailable, Fenced, StreamName, StreamPlan, Target
from libs.core.errors import DataSyncError
from tests.integration.connectors.moving import (
    BEYOND_PARQUET,
    EVERY_TYPE,
    Counts,
    Server,
    context_of,
    move,
    plan_of,
)

MANY = """
CREATE TABLE many AS SELECT n AS id, 'row ' || n AS note, n / 3.0::float8 AS part, md5(n::text)::uuid AS key
FROM generate_series(1, 200000) n;
ALTER TABLE many ADD PRIMARY KEY (id); ANALYZE many;
"""


async def test_every_type_arrives_without_loss(source: Server, destination: Server) -> None:
    await source.execute(EVERY_TYPE + BEYOND_PARQUET)
    counts = Counts()
    written = await move(source, destination, progress=counts)
    assert written.rows == counts.rows_read == counts.rows_written == 6
    assert written.verified is True
    assert await destination.rows("everything") == await source.rows("everything")
    domain = "SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attname = 'paid'"
    assert await destination.value(domain) == "numeric(20,4)"


async def test_types_that_are_built_in_pass_in_binary_and_lose_nothing(source: Server, destination: Server) -> None:
    await source.execute(EVERY_TYPE + BEYOND_PARQUET)
    columns = [
        row["attname"]
        for row in await source.connection.fetch(
            "SELECT attname FROM pg_attribute WHERE attrelid = 'everything'::regclass AND attnum > 0 "
            "AND attname NOT IN ('feeling', 'moods', 'counts')"
        )
    ]
    written = await move(source, destination, plan_of(columns=columns))
    assert written.verified is True
    quoted = ", ".join('"' + name.replace('"', '""') + '"' for name in columns)
    assert await destination.rows("everything", quoted) == await source.rows("everything", quoted)


async def test_a_large_table_is_read_in_ranges_and_arrives_whole(source: Server, destination: Server) -> None:
    await source.execute(MANY)
    reading = registry.open_source("postgres", source.config | {"max_threads": 3})
    async with reading.snapshot() as snapshot:
        table = await snapshot.table(plan_of("many"))
        assert len(table.parts()) >= 1
    written = await move(source, destination, plan_of("many"))
    assert written.rows == 200_000
    assert written.verified is True
    assert await destination.value("SELECT count(DISTINCT id) FROM many") == 200_000
    assert (
        await destination.value("SELECT count(*) FROM pg_index WHERE indrelid = 'many'::regclass AND indisprimary") == 1
    )


async def test_ranges_cover_every_page_once(source: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("libs.connectors.postgres.table.PART_PAGES_MIN", 7)
    await source.execute(MANY + "CREATE TABLE empty (id int); CREATE VIEW seen AS SELECT * FROM many;")
    async with registry.open_source("postgres", source.config).snapshot() as snapshot:
        table = await snapshot.table(plan_of("many"))
        parts = table.parts()
        assert len(parts) > 10
        counted = [await source.value(f"SELECT count(*) {part.from_clause}") for part in parts]
        assert sum(counted) == 200_000
        assert len((await snapshot.table(plan_of("empty"))).parts()) == 1
        assert len((await snapshot.table(plan_of("seen"))).parts()) == 1


async def test_partitioned_tables_and_views_are_read_whole(source: Server, destination: Server) -> None:
    await source.execute(
        """
        CREATE TABLE sold (id int, region text) PARTITION BY LIST (region);
        CREATE TABLE sold_north PARTITION OF sold FOR VALUES IN ('north');
        CREATE TABLE sold_south (region text, dropped int, id int);
        ALTER TABLE sold_south DROP COLUMN dropped;
        ALTER TABLE sold ATTACH PARTITION sold_south FOR VALUES IN ('south');
        INSERT INTO sold SELECT n, CASE WHEN n % 2 = 0 THEN 'north' ELSE 'south' END FROM generate_series(1, 1000) n;
        CREATE VIEW northern AS SELECT * FROM sold WHERE region = 'north';
        """
    )
    assert (await move(source, destination, plan_of("sold"))).verified is True
    assert (await move(source, destination, plan_of("northern"), context_of(epoch=2))).rows == 500
    assert await destination.rows("sold") == await source.rows("sold")


@pytest.mark.parametrize("definition", ["(id int)", "(id int PRIMARY KEY, note text)", "(note text)"])
async def test_an_empty_table_arrives_with_its_columns(source: Server, destination: Server, definition: str) -> None:
    await source.execute(f"CREATE TABLE nothing {definition}")
    written = await move(source, destination, plan_of("nothing"))
    assert (written.rows, written.verified) == (0, True)
    assert await destination.value("SELECT count(*) FROM nothing") == 0


async def test_a_refresh_replaces_what_was_there(source: Server, destination: Server) -> None:
    await source.execute("CREATE TABLE t (id int); INSERT INTO t VALUES (1), (1), (2)")
    await move(source, destination, plan_of("t"))
    await destination.execute("GRANT SELECT ON t TO pg_monitor")
    await source.execute(
        "ALTER TABLE t ADD COLUMN note text; DELETE FROM t WHERE id = 1; INSERT INTO t VALUES (3, 'x')"
    )
    await move(source, destination, plan_of("t"), context_of("run-2", 2))
    assert await destination.rows("t") == ["(2,)", "(3,x)"]
    assert await destination.value("SELECT has_table_privilege('pg_monitor', 't', 'SELECT')")
    assert await destination.tables() == ["public.t"]


async def test_a_table_that_others_built_on_keeps_its_identity(source: Server, destination: Server) -> None:
    await source.execute("CREATE TABLE t (id int PRIMARY KEY, note text); INSERT INTO t VALUES (1, 'a')")
    await move(source, destination, plan_of("t"))
    await destination.execute("CREATE VIEW seen AS SELECT note FROM t; CREATE INDEX ON t (note)")
    oid = await destination.value("SELECT 't'::regclass::oid")
    await source.execute("INSERT INTO t VALUES (2, 'b')")
    await move(source, destination, plan_of("t"), context_of("run-2", 2))
    assert await destination.rows("seen") == ["(a)", "(b)"]
    assert await destination.value("SELECT 't'::regclass::oid") == oid
    await source.execute("ALTER TABLE t ADD COLUMN more int")
    await move(source, destination, plan_of("t"), context_of("run-3", 3))
    assert await destination.rows("t") == ["(1,a,)", "(2,b,)"]
    assert await destination.value("SELECT 't'::regclass::oid") == oid


async def test_a_table_with_rows_of_somebody_else_is_not_touched(source: Server, destination: Server) -> None:
    await source.execute("CREATE TABLE t (id int)")
    await destination.execute("CREATE TABLE t (id int); INSERT INTO t VALUES (42)")
    with pytest.raises(ConnectorRefused, match=r"public\.t with rows that DataSync did not write"):
        await move(source, destination, plan_of("t"))
    assert await destination.rows("t") == ["(42)"]


@pytest.mark.parametrize(
    "before", ["SELECT", "CREATE TABLE t (id int)", "CREATE TABLE t (id int); CREATE INDEX ON t (id)"]
)
async def test_rows_that_somebody_else_wrote_meanwhile_are_not_touched(
    source: Server, destination: Server, before: str
) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    await destination.execute(before)
    async with (
        registry.open_source("postgres", source.config).snapshot() as snapshot,
        destination.destination().open(context_of()) as run,
    ):
        table = await snapshot.table(plan_of("t"))
        await run.prepare(table)
        await destination.execute("CREATE TABLE IF NOT EXISTS t (id int); INSERT INTO t VALUES (42)")
        with pytest.raises(ConnectorRefused, match="rows that DataSync did not write"):
            await run.write(table, Counts())
    assert await destination.rows("t") == ["(42)"]
    assert await destination.tables() == ["public.t"]


async def test_a_type_that_the_destination_lacks_is_refused_by_name(source: Server, destination: Server) -> None:
    await source.execute("CREATE TYPE point3 AS (x int, y int, z int); CREATE TABLE t (id int, place point3)")
    with pytest.raises(ConnectorRefused, match=r"column 'place' is of type public\.point3"):
        await move(source, destination, plan_of("t"))
    assert await destination.tables() == []


async def test_a_dropped_table_is_named(source: Server, destination: Server) -> None:
    with pytest.raises(ConnectorRefused, match=r"no table public\.gone: it was dropped"):
        await move(source, destination, plan_of("gone"))
    await source.execute("CREATE TABLE late (id int)")
    async with registry.open_source("postgres", source.config).snapshot() as snapshot:
        await source.execute("DROP TABLE late")
        with pytest.raises(ConnectorRefused, match=r"no table public\.late"):
            await snapshot.table(plan_of("late"))


async def test_every_part_is_of_one_moment(source: Server, destination: Server) -> None:
    await source.execute("CREATE TABLE t AS SELECT n AS id FROM generate_series(1, 100) n")
    async with (
        registry.open_source("postgres", source.config).snapshot() as snapshot,
        destination.destination().open(context_of()) as run,
    ):
        table = await snapshot.table(plan_of("t"))
        await source.execute("DELETE FROM t WHERE id <= 50; INSERT INTO t SELECT generate_series(1000, 3000)")
        written = await run.write(table, Counts())
    assert (written.rows, written.verified) == (100, True)
    assert await destination.value("SELECT sum(id) FROM t") == 5050


async def test_an_older_epoch_can_not_commit(source: Server, destination: Server) -> None:
    """A worker that was paused past its lease goes on from where it was, after another took over."""
    await source.execute("CREATE TABLE t AS SELECT n AS id FROM generate_series(1, 10) n")
    async with (
        registry.open_source("postgres", source.config).snapshot() as snapshot,
        destination.destination().open(context_of("run-1", 1)) as paused,
    ):
        table = await snapshot.table(plan_of("t"))
        await source.execute("DELETE FROM t WHERE id > 5")
        await move(source, destination, plan_of("t"), context_of("run-2", 2))
        with pytest.raises(DataSyncError) as refusal:
            await paused.write(table, Counts())
        assert isinstance(refusal.value, Fenced)
    with pytest.raises(Fenced):
        await move(source, destination, plan_of("t"), context_of("run-1", 1))
    assert await destination.value("SELECT count(*) FROM t") == 5
    assert await destination.tables() == ["public.t"]


async def test_a_paused_writer_holding_locks_does_not_stop_the_next(source: Server, destination: Server) -> None:
    """Its session in the middle of a commit is ended, for it would hold the job's row for ever."""
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    await move(source, destination, plan_of("t"), context_of("run-1", 1))
    async with Server.connected(_dsn(destination)) as paused:
        await paused.execute("SET application_name = 'datasync write job 1 epoch 1'")
        await paused.execute("BEGIN; SELECT * FROM _datasync._datasync_state WHERE job_id = 1 FOR UPDATE")
        async with asyncio.timeout(20):
            written = await move(source, destination, plan_of("t"), context_of("run-2", 2))
    assert written.rows == 1


async def test_a_writers_session_can_be_told_whatever_name_the_configuration_gives_it(
    source: Server, destination: Server
) -> None:
    """A paused one is found by its name, so that its locks end with it."""
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    destination.overrides["jdbc_url_params"] = {"ApplicationName": "reports"}
    lines: list[tuple[str, str]] = []
    context = replace(context_of("run-1", 1), log=lambda level, line: lines.append((level, line)))
    async with destination.destination().open(context):
        named = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'datasync write job 1 epoch 1'"
        assert await destination.value(named) == 1
    assert [level for level, line in lines if "application_name" in line] == ["warning"]


async def test_a_resumed_run_knows_what_it_has_committed(source: Server, destination: Server) -> None:
    await source.execute("CREATE TABLE t AS SELECT generate_series(1, 10) AS id")
    await move(source, destination, plan_of("t"), context_of("run-1", 1))
    async with destination.destination().open(context_of("run-1", 2)) as run:
        committed = await run.committed(plan_of("t"))
        assert committed is not None
        assert (committed.rows, committed.verified) == (10, True)
        assert await run.committed(plan_of("other")) is None
    async with destination.destination().open(context_of("run-2", 3)) as run:
        assert await run.committed(plan_of("t")) is None


async def test_a_destination_that_may_not_be_written_to_says_so_and_stays(source: Server, destination: Server) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    await destination.execute(f"ALTER DATABASE {destination.config['database']} SET default_transaction_read_only = on")
    with pytest.raises(ConnectorRefused, match="the destination is read-only"):
        await destination.destination().check()
    with pytest.raises(ConnectorRefused, match="the destination is read-only"):
        await move(source, destination, plan_of("t"))
    assert await destination.tables() == []


async def test_a_failure_while_copying_leaves_the_table_as_it_was(source: Server, destination: Server) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    await move(source, destination, plan_of("t"), context_of("run-1", 1))
    await source.execute(
        "DROP TABLE t; CREATE TABLE base AS SELECT n AS id FROM generate_series(1, 50000) n;"
        "CREATE VIEW t AS SELECT 1 / (40000 - id) AS id FROM base"
    )
    with pytest.raises(ConnectorRefused, match=r"reading public\.t from the source: division by zero"):
        await move(source, destination, plan_of("t"), context_of("run-2", 2))
    assert await destination.rows("t") == ["(1)"]
    assert await destination.tables() == ["public.t"]


@pytest.mark.parametrize("arrives", [True, False])
async def test_a_connection_that_breaks_while_committing_is_settled_by_the_marker(
    source: Server, destination: Server, arrives: bool
) -> None:
    """The commit may or may not have arrived: either way it is known afterwards, and nothing is written twice."""
    await source.execute("CREATE TABLE t AS SELECT generate_series(1, 10) AS id")
    async with destination.destination().open(context_of("before")):
        """Makes what all runs share, so that the first COMMIT is the publication's."""
    async with cut_at_commit(destination.config["port"], arrives=arrives) as (port, cuts):
        destination.overrides = {"port": port}
        if arrives:
            assert (await move(source, destination, plan_of("t"))).rows == 10
        else:
            with pytest.raises(ConnectorUnavailable, match="broke off"):
                await move(source, destination, plan_of("t"))
        assert cuts == ["cut"]
    assert await destination.tables() == (["public.t"] if arrives else [])


async def test_a_connection_that_breaks_while_it_has_no_room_to_write_is_noticed(
    source: Server, destination: Server
) -> None:
    await source.execute("CREATE TABLE t AS SELECT repeat('x', 1000) AS x FROM generate_series(1, 40000)")
    await destination.execute(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(60); END $$;"
        "CREATE TABLE t (x text); CREATE TRIGGER slow BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION slow()"
    )
    writing = await connect(PostgresDestinationConfig(**destination.config), application_name="test")
    async with registry.open_source("postgres", source.config).snapshot() as snapshot:
        table = await snapshot.table(plan_of("t"))
        assert isinstance(table, PostgresTable)
        copying = asyncio.create_task(
            copy_part(
                table, table.parts()[0], writing, ("public", "t"), binary=True, bytes_read=lambda _: None,
                bytes_written=lambda _: None, writing_failed=lambda error: failure(error, "writing"),
            )
        )  # fmt: skip
        async with asyncio.timeout(20):
            # The driver stops where that much waits to be sent (asyncio's high-water mark).
            while writing._transport.get_write_buffer_size() < 64 * 1024:  # type: ignore[attr-defined]
                await asyncio.sleep(0.01)
            await destination.value("SELECT pg_terminate_backend($1)", writing.get_server_pid())
            with pytest.raises(ExceptionGroup) as broken:
                await copying
        assert broken.group_contains(ConnectorUnavailable, match="writing broke off")


async def test_a_lost_snapshot_is_worth_another_try(source: Server, destination: Server) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    async with (
        registry.open_source("postgres", source.config).snapshot() as snapshot,
        destination.destination().open(context_of()) as run,
    ):
        table = await snapshot.table(plan_of("t"))
        await source.value(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'datasync snapshot' AND datname = current_database()"
        )
        with pytest.raises(ConnectorUnavailable, match="snapshot was lost"):
            await run.write(table, Counts())
    assert await destination.tables() == []


async def test_clearing_removes_the_tables_of_datasync_alone(source: Server, destination: Server) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    await destination.execute("CREATE TABLE foreign_table AS SELECT 1 AS id")
    await move(source, destination, plan_of("t"), context_of("run-1", 1))
    async with destination.destination().open(context_of("run-2", 2)) as run:
        await run.clear(plan_of("t"))
        await run.clear(plan_of("foreign_table"))
    assert await destination.tables() == ["public.foreign_table"]


@pytest.mark.parametrize(("job_id", "project_id"), [(2, 1), (1, 2)])
async def test_a_table_of_another_job_is_neither_replaced_nor_cleared(
    source: Server, destination: Server, job_id: int, project_id: int
) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    await move(source, destination, plan_of("t"), context_of())
    counts = Counts()
    other = context_of("run-2", 2, job_id=job_id, project_id=project_id)
    with pytest.raises(ConnectorRefused, match=r"public\.t is written by job 1") as refusal:
        await move(source, destination, plan_of("t"), other, counts)
    assert (refusal.value.code, counts.rows_read) == ("target_shared", 0)
    async with destination.destination().open(other) as run:
        with pytest.raises(ConnectorRefused, match="is written by job 1"):
            await run.clear(plan_of("t"))
    assert await destination.rows("t") == ["(1)"]


async def test_a_table_that_another_job_commits_meanwhile_is_kept(source: Server, destination: Server) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    async with (
        registry.open_source("postgres", source.config).snapshot() as snapshot,
        destination.destination().open(context_of("run-2", job_id=2)) as run,
    ):
        table = await snapshot.table(plan_of("t"))
        await run.prepare(table)
        await source.execute("UPDATE t SET id = 7")
        await move(source, destination, plan_of("t"), context_of())
        with pytest.raises(ConnectorRefused, match="is written by job 1"):
            await run.write(table, Counts())
    assert await destination.rows("t") == ["(7)"]


async def test_markers_without_a_project_are_told_by_their_job(source: Server, destination: Server) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    await move(source, destination, plan_of("t"), context_of())
    await destination.execute("ALTER TABLE _datasync._datasync_streams DROP COLUMN project_id")
    with pytest.raises(ConnectorRefused, match="is written by job 1"):
        await move(source, destination, plan_of("t"), context_of("run-2", job_id=2))
    assert (await move(source, destination, plan_of("t"), context_of("run-3", 2))).rows == 1


async def test_a_default_schema_takes_every_table(source: Server, destination: Server) -> None:
    await source.execute(EVERY_TYPE)
    destination.overrides["default_schema"] = 'odd "schema'
    assert (await move(source, destination)).verified is True
    assert 'odd "schema.everything' in await destination.tables()


async def test_two_streams_that_a_default_schema_brings_together_are_refused(
    source: Server, destination: Server
) -> None:
    await source.execute("CREATE SCHEMA a; CREATE TABLE a.t AS SELECT 1 AS id; CREATE TABLE t AS SELECT 2 AS id")
    destination.overrides["default_schema"] = "all_of_it"
    async with (
        registry.open_source("postgres", source.config).snapshot() as snapshot,
        destination.destination().open(context_of()) as run,
    ):
        await run.prepare(await snapshot.table(plan_of("t")))
        other = StreamPlan(StreamName("a", "t"), Target("a", "t"), None)
        with pytest.raises(ConnectorRefused, match=r"public\.t and a\.t are both written to all_of_it\.t"):
            await run.prepare(await snapshot.table(other))


@asynccontextmanager
async def cut_at_commit(backend_port: int, *, arrives: bool) -> AsyncIterator[tuple[int, list[str]]]:
    """A way to the server that breaks at the first COMMIT, before or after handing it on."""
    cuts: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back_reader, back_writer = await asyncio.open_connection("127.0.0.1", backend_port)
        answering = asyncio.create_task(_pump(back_reader, writer))
        while data := await reader.read(65536):
            if b"COMMIT;\0" in data and not cuts:
                cuts.append("cut")
                answering.cancel()
                if arrives:
                    back_writer.write(data)
                    await back_writer.drain()
                break
            back_writer.write(data)
            await back_writer.drain()
        writer.close()
        back_writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        yield listening.sockets[0].getsockname()[1], cuts


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


def _dsn(server: Server) -> str:
    config = server.config
    address = f"{config['host']}:{config['port']}/{config['database']}"
    return f"postgresql://{config['username']}:{config['password']}@{address}"
