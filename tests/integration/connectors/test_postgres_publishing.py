"""What becomes of a target when a run publishes: what DataSync made is exchanged, all else is kept or refused."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from libs.connectors import registry
from libs.connectors.postgres import target as targets
from libs.connectors.postgres.state import State
from libs.connectors.protocol import (
    ConnectorRefused,
    ConnectorUnavailable,
    RunContext,
    StreamName,
    StreamPlan,
    Target,
    TargetShared,
    Written,
)
from tests.integration.connectors.moving import BEYOND_PARQUET, EVERY_TYPE, Counts, Server, context_of, move, plan_of

MADE = "CREATE TABLE t (id int PRIMARY KEY, note text); INSERT INTO t VALUES (1, 'a'), (2, 'b')"
OID = "SELECT 't'::regclass::oid"
ROWS_THAT_CHANGED = """
CREATE FUNCTION changed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.note := 'changed'; RETURN NEW; END $$;
CREATE TRIGGER changes BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION changed();
"""
ROWS_THAT_VANISH = """
CREATE FUNCTION vanished() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
CREATE TRIGGER vanishes BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION vanished();
"""
CHANGES = [
    ("ALTER TABLE {t} ADD COLUMN at timestamptz DEFAULT now()", "SELECT count(at) = 2 FROM {t}"),
    (
        "ALTER TABLE {t} ADD COLUMN nr int GENERATED ALWAYS AS IDENTITY",
        "SELECT count(DISTINCT nr) = 2 AND max(nr) = 3 FROM {t}",
    ),
    ("CREATE SEQUENCE counted OWNED BY {t}.id", "SELECT to_regclass('counted') IS NOT NULL"),
    ("ALTER TABLE {t} SET UNLOGGED", "SELECT relpersistence = 'u' FROM pg_class WHERE relname = '{t}'"),
    ("ALTER TABLE {t} SET (fillfactor = 50)", "SELECT reloptions IS NOT NULL FROM pg_class WHERE relname = '{t}'"),
    (
        "ALTER TABLE {t} SET (toast.autovacuum_enabled = off)",
        "SELECT reloptions IS NOT NULL FROM pg_class "
        "WHERE oid = (SELECT reltoastrelid FROM pg_class WHERE relname = '{t}')",
    ),
    (
        "ALTER TABLE {t} ALTER note SET STORAGE EXTERNAL",
        "SELECT attstorage = 'e' FROM pg_attribute WHERE attrelid = '{t}'::regclass AND attname = 'note'",
    ),
    (
        "ALTER TABLE {t} ALTER note SET STATISTICS 7",
        "SELECT attstattarget = 7 FROM pg_attribute WHERE attrelid = '{t}'::regclass AND attname = 'note'",
    ),
    (
        "ALTER TABLE {t} DROP CONSTRAINT {t}_pkey, ADD PRIMARY KEY (note)",
        "SELECT conkey = '{{2}}' FROM pg_constraint WHERE conrelid = '{t}'::regclass AND contype = 'p'",
    ),
    ("COMMENT ON COLUMN {t}.note IS 'ours'", "SELECT col_description('{t}'::regclass, 2) = 'ours'"),
    ("CREATE INDEX notes ON {t} (note)", "SELECT to_regclass('notes') IS NOT NULL"),
    ("CREATE VIEW seen AS SELECT note FROM {t}", "SELECT count(*) = 2 FROM seen"),
    ("CREATE TABLE uses (row {t})", "SELECT to_regclass('uses') IS NOT NULL"),
    ("CREATE FUNCTION of({t}) RETURNS int LANGUAGE sql AS 'SELECT 1'", "SELECT sum(of({t})) = 2 FROM {t}"),
    (
        "CREATE TABLE child (LIKE {t}); CREATE TABLE of_t (x int REFERENCES {t} DEFERRABLE)",
        "SELECT to_regclass('of_t') IS NOT NULL",
    ),
    ("CREATE POLICY only_a ON {t} USING (note = 'a')", "SELECT count(*) = 1 FROM pg_policy"),
    ("CREATE STATISTICS both_of ON id, note FROM {t}", "SELECT count(*) = 1 FROM pg_statistic_ext"),
    ("GRANT SELECT (note) ON {t} TO pg_monitor", "SELECT has_column_privilege('pg_monitor', '{t}', 'note', 'SELECT')"),
    ("CREATE PUBLICATION of_others FOR TABLE {t}", "SELECT count(*) = 1 FROM pg_publication_rel"),
    ("GRANT USAGE ON TYPE {t} TO pg_monitor", "SELECT typacl IS NOT NULL FROM pg_type WHERE typname = '{t}'"),
]
REFUSED = [
    (
        "CREATE TABLE t (id int PRIMARY KEY, note text); CREATE TABLE child (x int CONSTRAINT up REFERENCES t)",
        "foreign key 'up' of .*child refers to .*public.t",
    ),
    (
        "CREATE TABLE t (id int PRIMARY KEY, note text);"
        "CREATE TABLE child (x int CONSTRAINT up REFERENCES t ON DELETE CASCADE DEFERRABLE)",
        "foreign key 'up'",
    ),
    ("CREATE TABLE t (id int, note text, size int NOT NULL)", "column 'size', which is NOT NULL"),
    ("CREATE TABLE t (id int, note text GENERATED ALWAYS AS ('x') STORED)", "generated column 'note'"),
    ("CREATE TABLE t (id int)", "has no column 'note'"),
    ("CREATE TABLE t (id bigint, note text)", "column 'id' of type bigint"),
    ("CREATE TABLE t (id int, note text); CREATE TABLE child () INHERITS (t)", r"inherited by public\.child"),
    ("CREATE VIEW t AS SELECT 1 AS id, 'x' AS note", "is not a table"),
    ("CREATE TYPE t AS ENUM ('x')", "has a type public\\.t"),
    ("CREATE TABLE t (id int, note text); CREATE PUBLICATION feed FOR TABLE t", "publication 'feed'"),
    ("CREATE TABLE t (id int, note text); CREATE RULE away AS ON INSERT TO t DO INSTEAD NOTHING", "rule 'away'"),
    ("CREATE TABLE t (id int, note text); CREATE RULE stay AS ON DELETE TO t DO INSTEAD NOTHING", "rule 'stay'"),
]
# What a read takes that nothing hinders, on a busy machine.
UNHINDERED_SECONDS = 0.03


def logging(context: RunContext) -> tuple[RunContext, list[str]]:
    lines: list[str] = []
    return replace(context, log=lambda level, line: lines.append(line)), lines


@pytest.fixture
async def published(source: Server, destination: Server) -> Server:
    """The destination with two rows in a table that a run made; the source has a third by now."""
    await source.execute(MADE)
    await move(source, destination, plan_of("t"), context_of("run-0", 1))
    await source.execute("INSERT INTO t VALUES (3, 'c')")
    return destination


async def test_a_table_that_is_as_it_was_made_is_exchanged(source: Server, published: Server) -> None:
    changes = ["SELECT", "VACUUM FULL t", "ANALYZE t", "GRANT SELECT ON t TO pg_monitor"]
    changes += ["CREATE VIEW seen AS TABLE t; DROP VIEW seen"]
    for epoch, change in enumerate(changes, 2):
        before = await published.value(OID)
        await published.execute(change)
        context, lines = logging(context_of(f"run-{epoch}", epoch))
        assert (await move(source, published, plan_of("t"), context)).verified is True
        assert await published.value(OID) != before, lines
        assert await published.rows("t") == ["(1,a)", "(2,b)", "(3,c)"]
    key = "SELECT conname FROM pg_constraint WHERE conrelid = 't'::regclass AND contype = 'p'"
    assert await published.value(key) == "t_pkey"


async def test_tables_that_others_changed_are_kept_and_their_rows_are_replaced(
    source: Server, destination: Server
) -> None:
    for number, (change, there) in enumerate(CHANGES):
        name = f"t{number}"
        await source.execute(f"CREATE TABLE {name} (id int PRIMARY KEY, note text); INSERT INTO {name} VALUES (1, 'a')")
        await move(source, destination, plan_of(name), context_of("run-1", 1))
        before = await destination.value(f"SELECT '{name}'::regclass::oid")
        await destination.execute(change.format(t=name))
        await source.execute(f"INSERT INTO {name} VALUES (2, 'b')")
        context, lines = logging(context_of("run-2", 1))
        assert (await move(source, destination, plan_of(name), context)).verified is True, change
        assert await destination.value(there.format(t=name)) is True, change
        await move(source, destination, plan_of(name), context_of("run-3", 1))
        assert await destination.rows(name, "id, note") == ["(1,a)", "(2,b)"], change
        assert await destination.value(f"SELECT '{name}'::regclass::oid") == before, change
        assert any("is kept and its rows are replaced" in line for line in lines), change
    assert not [name for name in await destination.tables() if "_datasync" in name]


async def test_a_table_that_began_to_be_kept_is_warned_of_with_the_names_of_what_keeps_it(
    source: Server, published: Server
) -> None:
    await published.execute(
        """
        CREATE VIEW seen AS TABLE t; CREATE INDEX notes ON t (note); ALTER TABLE t SET (fillfactor = 50);
        CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
        CREATE TRIGGER audit AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION nothing();
        """
    )
    lines: list[tuple[str, str]] = []
    context = replace(context_of("run-1", 2), log=lambda level, line: lines.append((level, line)))
    await move(source, published, plan_of("t"), context)
    (kept,) = [(level, line) for level, line in lines if "is kept" in line]
    assert kept[0] == "warning"
    assert "what depends on it: index public.notes, trigger audit on table public.t, view public.seen" in kept[1]
    assert "its own properties: fillfactor=50" in kept[1]
    assert "its keys and constraints: index public.notes" in kept[1]


async def test_a_table_that_others_made_is_kept_without_a_warning(source: Server, destination: Server) -> None:
    await source.execute(MADE)
    await destination.execute("CREATE TABLE t (id int, note text)")
    lines: list[tuple[str, str]] = []
    for run in (1, 2):
        context = replace(context_of(f"run-{run}", run), log=lambda level, line: lines.append((level, line)))
        await move(source, destination, plan_of("t"), context)
    assert [level for level, line in lines if "DataSync did not create it" in line] == ["info", "info"]


async def test_an_owned_table_that_was_made_anew_by_hand_is_kept(source: Server, published: Server) -> None:
    await published.execute("DROP TABLE t; CREATE TABLE t (id int PRIMARY KEY, note text)")
    before = await published.value(OID)
    await move(source, published, plan_of("t"), context_of("run-1", 2))
    assert await published.value(OID) == before


async def test_an_empty_table_that_was_made_by_hand_is_kept(source: Server, destination: Server) -> None:
    await source.execute(MADE)
    await destination.execute("CREATE TABLE t (id int, note text)")
    before = await destination.value(OID)
    for run in (1, 2):
        await move(source, destination, plan_of("t"), context_of(f"run-{run}", run))
        assert await destination.value(OID) == before
    assert await destination.rows("t", "id, note") == ["(1,a)", "(2,b)"]
    async with destination.destination().open(context_of("run-3", 3)) as run_to_clear:
        await run_to_clear.clear(plan_of("t"))
    assert await destination.value("SELECT count(*) FROM t") == 0


async def test_a_table_of_before_its_making_was_recorded_is_kept(source: Server, published: Server) -> None:
    await published.execute("ALTER TABLE _datasync._datasync_streams DROP COLUMN published_json")
    before = await published.value(OID)
    await move(source, published, plan_of("t"), context_of("run-1", 2))
    assert await published.value(OID) == before
    assert await published.rows("t") == ["(1,a)", "(2,b)", "(3,c)"]


async def test_privileges_are_handed_on_as_they_are(source: Server, published: Server) -> None:
    """Default privileges give a new table what somebody may have taken away from the one before."""
    await published.execute("ALTER DEFAULT PRIVILEGES GRANT SELECT, INSERT ON TABLES TO pg_monitor, PUBLIC")
    await published.execute("GRANT UPDATE ON t TO pg_read_all_data WITH GRANT OPTION")
    acl = "SELECT array_agg(a::text ORDER BY a::text) FROM pg_class c, unnest(c.relacl) a WHERE relname = 't'"
    before, oid = await published.value(acl), await published.value(OID)
    await move(source, published, plan_of("t"), context_of("run-1", 2))
    assert await published.value(OID) != oid
    assert await published.value(acl) == before
    assert not await published.value("SELECT has_table_privilege('pg_monitor', 't', 'SELECT')")


async def test_what_can_not_work_is_refused_by_name_before_the_first_row(source: Server, destination: Server) -> None:
    await source.execute(MADE)
    counts = Counts()
    for target, refusal in REFUSED:
        await destination.execute(f"DROP SCHEMA public CASCADE; CREATE SCHEMA public; {target}")
        with pytest.raises(ConnectorRefused, match=refusal):
            await move(source, destination, plan_of("t"), progress=counts)
    assert counts.rows_read == 0


async def test_what_the_role_may_not_do_is_refused_before_the_first_row(source: Server, destination: Server) -> None:
    await source.execute(MADE)
    await destination.execute(
        """
        DROP ROLE IF EXISTS limited_writer; CREATE ROLE limited_writer LOGIN PASSWORD 'limited';
        CREATE SCHEMA _datasync AUTHORIZATION limited_writer;
        CREATE TABLE t (id int, note text); GRANT SELECT, INSERT ON t TO limited_writer;
        """
    )
    destination.overrides = {"username": "limited_writer", "password": "limited"}
    counts = Counts()
    try:
        with pytest.raises(ConnectorRefused, match="may not create tables in the destination's schema 'public'"):
            await move(source, destination, plan_of("t"), progress=counts)
        await destination.execute("GRANT CREATE ON SCHEMA public TO limited_writer")
        with pytest.raises(ConnectorRefused, match=r"public\.t: it lacks DELETE"):
            await move(source, destination, plan_of("t"), context_of(epoch=2), counts)
        await destination.execute("GRANT DELETE ON t TO limited_writer; ALTER TABLE t ENABLE ROW LEVEL SECURITY")
        with pytest.raises(ConnectorRefused, match=r"public\.t.* row.(level )?security"):
            await move(source, destination, plan_of("t"), context_of(epoch=3), counts)
        assert counts.rows_read == 0
        await destination.execute("ALTER TABLE t DISABLE ROW LEVEL SECURITY")
        await move(source, destination, plan_of("t"), context_of(epoch=4), counts)
        assert await destination.rows("t") == ["(1,a)", "(2,b)"]
        made = StreamPlan(StreamName("public", "t"), Target("public", "made"))
        for epoch in (5, 6):
            oid = await destination.value("SELECT to_regclass('made')::oid")
            await move(source, destination, made, context_of(f"run-{epoch}", epoch))
            assert await destination.value("SELECT to_regclass('made')::oid") != oid
    finally:
        await destination.execute("DROP OWNED BY limited_writer; DROP ROLE limited_writer")


async def test_rows_of_every_type_are_replaced_in_a_kept_table(source: Server, destination: Server) -> None:
    await source.execute(EVERY_TYPE + BEYOND_PARQUET)
    await move(source, destination, context=context_of("run-1", 1))
    await destination.execute("CREATE VIEW seen AS SELECT * FROM everything")
    await source.execute("DELETE FROM everything WHERE id = 2")
    assert (await move(source, destination, context=context_of("run-2", 2))).verified is True
    assert await destination.rows("seen") == await source.rows("everything")


@pytest.mark.parametrize("declared", ["text", "varchar(20) DEFAULT ''", "json DEFAULT '{}'"])
async def test_values_that_others_wrote_into_a_column_of_their_own_are_not_lost(
    source: Server, published: Server, declared: str
) -> None:
    await published.execute(f"ALTER TABLE t ADD COLUMN remark {declared}")
    await move(source, published, plan_of("t"), context_of("run-1", 2))
    await published.execute("UPDATE t SET remark = '1' WHERE id = 1")
    before = await published.rows("t")
    with pytest.raises(ConnectorRefused, match="values in the column 'remark', which DataSync did not write"):
        await move(source, published, plan_of("t"), context_of("run-2", 3))
    assert await published.rows("t") == before


async def test_a_column_that_the_source_lost_is_empty_in_a_kept_table(source: Server, published: Server) -> None:
    await published.execute("CREATE VIEW seen AS SELECT id FROM t")
    await source.execute("ALTER TABLE t DROP COLUMN note")
    await move(source, published, plan_of("t"), context_of("run-1", 2))
    assert await published.rows("t") == ["(1,)", "(2,)", "(3,)"]


async def test_an_identity_that_is_always_generated_takes_the_sources_values(
    source: Server, destination: Server
) -> None:
    await source.execute(MADE)
    await destination.execute("CREATE TABLE t (id int GENERATED ALWAYS AS IDENTITY, note text)")
    assert (await move(source, destination, plan_of("t"))).verified is True
    assert await destination.rows("t") == ["(1,a)", "(2,b)"]


async def test_a_deferrable_foreign_key_into_the_target_is_kept_and_holds(source: Server, published: Server) -> None:
    await published.execute(
        "CREATE TABLE child (x int CONSTRAINT up REFERENCES t DEFERRABLE); INSERT INTO child VALUES (1)"
    )
    await move(source, published, plan_of("t"), context_of("run-1", 2))
    await source.execute("DELETE FROM t WHERE id = 1")
    with pytest.raises(ConnectorRefused, match='foreign key constraint "up"'):
        await move(source, published, plan_of("t"), context_of("run-2", 3))
    assert await published.rows("t") == ["(1,a)", "(2,b)", "(3,c)"]


@pytest.mark.parametrize(
    ("trigger", "name", "verify"),
    [
        (ROWS_THAT_CHANGED, "changes", True),
        (ROWS_THAT_VANISH, "vanishes", True),
        (ROWS_THAT_VANISH, "vanishes", False),
    ],
)
async def test_a_trigger_that_changes_what_is_written_is_named_and_the_old_rows_stay(
    source: Server, published: Server, trigger: str, name: str, verify: bool
) -> None:
    await published.execute(trigger)
    with pytest.raises(ConnectorRefused, match=f"trigger {name}"):
        await move(source, published, plan_of("t"), context_of("run-1", 2, verify=verify))
    assert await published.rows("t") == ["(1,a)", "(2,b)"]


async def test_a_table_is_not_copied_onto_itself(source: Server) -> None:
    await source.execute(MADE)
    counts = Counts()
    source.overrides = {"host": "localhost"}
    with pytest.raises(ConnectorRefused, match=r"public\.t is the table that the stream public\.t is read from"):
        await move(source, source, plan_of("t"), progress=counts)
    assert counts.rows_read == 0
    assert await source.rows("t") == ["(1,a)", "(2,b)"]


async def test_a_target_that_another_stream_of_the_run_reads_is_refused(source: Server) -> None:
    """Both streams are; a third one is not concerned."""
    await source.execute("CREATE TABLE a AS SELECT 1 AS id; CREATE TABLE b (id int); CREATE TABLE d AS SELECT 2 AS id")
    refusal = r"public\.b is the table that the stream public\.b is read from"

    def plan(name: str, target: str) -> StreamPlan:
        return StreamPlan(StreamName("public", name), Target("public", target))

    async with (
        registry.open_source("postgres", source.config).snapshot() as snapshot,
        source.destination().open(context_of()) as run,
    ):
        first, second = await snapshot.table(plan("a", "b")), await snapshot.table(plan("b", "c"))
        third = await snapshot.table(plan("d", "e"))
        await run.prepare(first)
        with pytest.raises(ConnectorRefused, match=refusal):
            await run.prepare(second)
        await run.prepare(third)
        with pytest.raises(ConnectorRefused, match=refusal):
            await run.write(first, Counts())
        assert (await run.write(third, Counts())).rows == 1


async def test_an_id_that_parent_and_child_share_arrives_twice(source: Server, destination: Server) -> None:
    await source.execute(MADE + "; CREATE TABLE child () INHERITS (t); INSERT INTO child VALUES (1, 'of the child')")
    context, lines = logging(context_of())
    assert (await move(source, destination, plan_of("t"), context)).rows == 3
    assert await destination.rows("t") == ['(1,"of the child")', "(1,a)", "(2,b)"]
    assert any("the target gets no primary key" in line for line in lines)


async def test_jobs_that_begin_at_once_at_a_new_destination_do_not_hinder_each_other(
    source: Server, destination: Server
) -> None:
    await source.execute(
        "CREATE TYPE mood AS ENUM ('sad'); CREATE SCHEMA new; CREATE TABLE new.t AS SELECT 'sad'::mood AS m"
    )
    jobs = range(1, 7)

    async def moved(job: int, table: str) -> object:
        plan = StreamPlan(StreamName("new", "t"), Target("new", table))
        try:
            return await move(source, destination, plan, context_of(f"run-{job}", job, job_id=job))
        except TargetShared as error:
            return error

    own = await asyncio.gather(*(moved(job, f"t{job}") for job in jobs))
    assert all(isinstance(one, Written) and one.verified for one in own)
    shared = await asyncio.gather(*(moved(job, "shared") for job in jobs))
    assert [type(one) for one in shared].count(Written) == 1
    assert [type(one) for one in shared].count(TargetShared) == len(jobs) - 1


@pytest.mark.parametrize("exists", [True, False], ids=["an empty table", "no table"])
@pytest.mark.parametrize("reads", range(1, 7))
async def test_a_job_that_published_between_two_reads_of_another_is_named(
    source: Server, destination: Server, monkeypatch: pytest.MonkeyPatch, reads: int, exists: bool
) -> None:
    """Another job's rows appear after the ``reads``-th read of the target: they are that job's, not a stranger's."""
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    if exists:
        await destination.execute("CREATE TABLE t (id int)")
    done: list[str] = []

    def counting(read: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[object]]:
        async def counted(*arguments: Any) -> object:
            result = await read(*arguments)
            done.append(read.__name__)
            if len(done) == reads:
                await move(source, destination, plan_of("t"), context_of("other", 1, job_id=2))
            return result

        return counted

    monkeypatch.setattr(targets, "relation_at", counting(targets.relation_at))
    monkeypatch.setattr(State, "published", counting(State.published))
    with pytest.raises(TargetShared):
        await move(source, destination, plan_of("t"), context_of("run", 1, job_id=1))
    assert len(done) > reads


async def test_a_run_whose_job_was_given_another_target_is_not_in_place_yet(source: Server, published: Server) -> None:
    context = context_of("run-0", 1)
    async with published.destination().open(context) as run:
        assert await run.committed(plan_of("t")) is not None
        assert await run.committed(StreamPlan(StreamName("public", "t"), Target("public", "other"))) is None


async def test_readers_hardly_wait_for_a_run_that_waits_for_a_long_query(
    source: Server, published: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The staged copy waits for the query's end; whoever reads meanwhile gets the old rows."""
    monkeypatch.setattr("libs.connectors.postgres.locking.LOGGED_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr("libs.connectors.postgres.locking.PAUSE_SECONDS_MAX", 0.1)
    context, lines = logging(context_of("run-1", 2))
    counts = Counts()
    waited_seconds = 0.0
    async with Server.connected(dsn_of(published)) as reader:
        await reader.execute("SET application_name = 'monthly report'; BEGIN; SELECT * FROM t")
        pid = await reader.value("SELECT pg_backend_pid()")
        moving = asyncio.create_task(move(source, published, plan_of("t"), context, counts))
        async with asyncio.timeout(30):
            while len(lines) < 15:
                assert not moving.done()
                started = time.monotonic()
                assert await published.rows("t") == ["(1,a)", "(2,b)"]
                waited_seconds += max(0.0, time.monotonic() - started - UNHINDERED_SECONDS)
                await asyncio.sleep(0)
        await reader.execute("COMMIT")
        await moving
    assert waited_seconds < 1.0
    assert re.search(rf"public\.t is in use by pid {pid} \(user postgres, application 'monthly report'", lines[0])
    assert "the copied rows are kept" in lines[0]
    assert counts.rows_read == 3
    assert await published.rows("t") == ["(1,a)", "(2,b)", "(3,c)"]


async def test_a_table_that_stays_in_use_is_left_as_it_was(
    source: Server, published: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("libs.connectors.postgres.locking.PATIENCE_SECONDS", 0.3)
    async with Server.connected(dsn_of(published)) as reader:
        await reader.execute("BEGIN; SELECT * FROM t")
        with pytest.raises(ConnectorUnavailable, match=r"public\.t could not be locked .* by pid \d+") as refusal:
            await move(source, published, plan_of("t"), context_of("run-1", 2))
    assert refusal.value.code == "target_locked"
    assert await published.rows("t") == ["(1,a)", "(2,b)"]
    assert await published.tables() == ["public.t"]


async def test_a_kept_table_is_published_while_it_is_read(source: Server, published: Server) -> None:
    await published.execute("CREATE VIEW seen AS SELECT * FROM t")
    async with Server.connected(dsn_of(published)) as reader:
        await reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT * FROM seen")
        async with asyncio.timeout(20):
            await move(source, published, plan_of("t"), context_of("run-1", 2))
        assert await reader.rows("seen") == ["(1,a)", "(2,b)"]
    assert await published.rows("seen") == ["(1,a)", "(2,b)", "(3,c)"]


async def test_what_others_do_while_a_run_waits_counts(source: Server, published: Server) -> None:
    """A view that is made while the locks are waited for is not lost."""
    context, lines = logging(context_of("run-1", 2))
    async with Server.connected(dsn_of(published)) as reader:
        await reader.execute("BEGIN; SELECT * FROM t")
        moving = asyncio.create_task(move(source, published, plan_of("t"), context))
        async with asyncio.timeout(20):
            while not lines:
                await asyncio.sleep(0.01)
        await published.execute("CREATE VIEW seen AS SELECT * FROM t")
        await moving
    assert await published.rows("seen") == ["(1,a)", "(2,b)", "(3,c)"]


async def test_a_roles_own_settings_change_nothing(source: Server, published: Server) -> None:
    """Under SERIALIZABLE, what a lock was waited for would not be seen."""
    await published.execute(
        f"ALTER DATABASE {published.config['database']} SET default_transaction_isolation = serializable"
    )
    await published.execute("CREATE VIEW seen AS SELECT * FROM t")
    await move(source, published, plan_of("t"), context_of("run-1", 2))
    assert await published.rows("seen") == ["(1,a)", "(2,b)", "(3,c)"]


STAGED = """
CREATE TABLE _datasync_stage_77_5_0123456789ab AS SELECT 1 AS id;
CREATE SCHEMA elsewhere; CREATE TABLE elsewhere._datasync_stage_78_6_0123456789ab AS SELECT 1 AS id;
"""


async def test_what_killed_runs_staged_is_swept_by_any_run(source: Server, destination: Server) -> None:
    """Also where their jobs are gone; a run that is at work keeps what it staged, and so does one that just began."""
    await destination.execute(STAGED)
    just_now = await destination.value("SELECT extract(epoch FROM now())::bigint")
    await destination.execute(f"CREATE TABLE _datasync_stage_79_{just_now}_0123456789ab (id int)")
    await destination.execute("CREATE TABLE _datasync_stage_of_mine (id int)")
    async with Server.connected(dsn_of(destination)) as at_work:
        await at_work.execute("SET application_name = 'datasync write job 78 epoch 6'")
        async with destination.destination().open(context_of()):
            assert await destination.tables() == [
                "elsewhere._datasync_stage_78_6_0123456789ab",
                f"public._datasync_stage_79_{just_now}_0123456789ab",
                "public._datasync_stage_of_mine",
            ]
    await destination.execute("CREATE TABLE _datasync_stage_80_7_0123456789ab (id int)")
    await destination.execute("CREATE VIEW seen AS TABLE _datasync_stage_80_7_0123456789ab")
    context, lines = logging(context_of("run-2", 2))
    async with destination.destination().open(context):
        assert "elsewhere._datasync_stage_78_6_0123456789ab" not in await destination.tables()
    assert any("which a run of job 78 left" in line for line in lines)
    assert any("could not drop the staging table public._datasync_stage_80_7_0123456789ab" in line for line in lines)


@pytest.mark.parametrize(
    ("present", "labels"),
    [
        ("'a', 'c', 'e'", ["a", "b", "c", "d", "e", "f"]),
        ("'c'", ["a", "b", "c", "d", "e", "f"]),
        ("", ["a", "b", "c", "d", "e", "f"]),
        ("'x', 'b', 'y', 'e'", ["x", "a", "b", "c", "d", "y", "e", "f"]),
    ],
)
async def test_an_enums_labels_sort_as_at_the_source(
    source: Server, destination: Server, present: str, labels: list[str]
) -> None:
    await source.execute("CREATE TYPE mood AS ENUM ('a', 'b', 'c', 'd', 'e', 'f'); CREATE TABLE t (m mood)")
    await destination.execute(f"CREATE TYPE mood AS ENUM ({present})")
    await move(source, destination, plan_of("t"))
    assert await destination.value("SELECT enum_range(NULL::mood)::text[]") == labels


@pytest.mark.parametrize(
    ("definition", "refusal"),
    [
        ("CREATE TYPE mood AS ENUM ('b', 'a')", r"public\.mood has its labels in another order .*'b' before 'a'"),
        ("CREATE DOMAIN mood AS text", r"public\.mood is not an enum"),
    ],
)
async def test_an_enum_that_can_not_sort_as_at_the_source_is_refused(
    source: Server, destination: Server, definition: str, refusal: str
) -> None:
    await source.execute("CREATE TYPE mood AS ENUM ('a', 'b'); CREATE TABLE t AS SELECT 'a'::mood AS m")
    await destination.execute(definition)
    counts = Counts()
    with pytest.raises(ConnectorRefused, match=refusal):
        await move(source, destination, plan_of("t"), progress=counts)
    assert counts.rows_read == 0


def dsn_of(server: Server) -> str:
    config = server.config
    address = f"{config['host']}:{config['port']}/{config['database']}"
    return f"postgresql://{config['username']}:{config['password']}@{address}"
