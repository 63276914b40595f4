"""What a source's rights, policies, types and settings do to what is read: nothing in silence."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from libs.connectors import registry
from libs.connectors.postgres import relations
from libs.connectors.postgres.config import PostgresSourceConfig
from libs.connectors.postgres.source import PostgresSource
from libs.connectors.protocol import ConnectorRefused, ConnectorUnavailable
from tests.integration.connectors.moving import Lake, Server, context_of, move, plan_of

POLICY = """
CREATE TABLE t AS SELECT n AS id FROM generate_series(1, 100) AS n;
ALTER TABLE t ENABLE ROW LEVEL SECURITY; CREATE POLICY few ON t USING (id <= 3);
"""
# What a role may be set to that would change a value's text, how a text is read, or what a statement means.
HOSTILE_SETTINGS = {
    "array_nulls": "off",
    "xmloption": "document",
    "xmlbinary": "hex",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "datestyle": "'German, DMY'",
    "intervalstyle": "sql_standard",
    "timezone": "'America/St_Johns'",
    "timezone_abbreviations": "'India'",
    "lc_monetary": "'C.UTF-8'",
    "quote_all_identifiers": "on",
    "standard_conforming_strings": "off",
    "backslash_quote": "off",
    "transform_null_equals": "on",
    "search_path": "shadow, pg_catalog",
    "default_transaction_isolation": "serializable",
    "client_encoding": "LATIN1",
    "statement_timeout": "1",
    "lock_timeout": "1",
    "row_security": "on",
}


@pytest.fixture
async def reader(source: Server) -> AsyncIterator[Server]:
    """The source as a role reads it that owns nothing."""
    role = f"reader_{source.config['database']}"
    await source.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'reading' CONNECTION LIMIT 2")
    await source.execute(f"ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO {role}")
    yield replace(source, overrides={"username": role, "password": "reading"})
    await source.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def _read(server: Server, table: str) -> tuple[str, ...]:
    """The warnings of a table that may be read."""
    opened = registry.open_source("postgres", server.config | server.overrides)
    async with opened.snapshot() as snapshot:
        return (await snapshot.table(plan_of(table))).warnings


async def test_rows_that_a_policy_hides_are_refused_before_the_first(reader: Server, destination: Server) -> None:
    await reader.execute(
        POLICY
        + "CREATE VIEW v WITH (security_barrier) AS SELECT * FROM t; ALTER VIEW v OWNER TO "
        + reader.overrides["username"]
    )
    for table in ("t", "v"):
        with pytest.raises(ConnectorRefused, match=rf"public\.{table} .*row-level security") as refusal:
            await _read(reader, table)
        assert refusal.value.code == "row_security"
        for way_out in ("owns the table", "FORCE", "BYPASSRLS", "row_security: filtered"):
            assert way_out in refusal.value.message
    assert (await move(replace(reader, overrides={}), destination, plan_of("t"))).rows == 100


async def test_visible_rows_are_read_with_a_warning_where_the_configuration_allows_it(
    reader: Server, destination: Server
) -> None:
    await reader.execute(POLICY + "CREATE TABLE plain AS SELECT 1 AS id")
    reader.overrides["row_security"] = "filtered"
    (warning,) = await _read(reader, "t")
    assert warning.startswith("public.t: row-level security applies: only the rows")
    assert await _read(reader, "plain") == ()
    assert (await move(reader, destination, plan_of("t"))).rows == 3


async def test_a_partitioned_table_is_read_with_its_own_rights_and_policies(
    reader: Server, destination: Server
) -> None:
    await reader.execute(
        f"""
        CREATE TABLE p (id int) PARTITION BY RANGE (id); CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (100);
        INSERT INTO p SELECT generate_series(0, 99); REVOKE SELECT ON p1 FROM {reader.overrides["username"]};
        """
    )
    assert (await move(reader, destination, plan_of("p"))).rows == 100
    await reader.execute("ALTER TABLE p ENABLE ROW LEVEL SECURITY; CREATE POLICY few ON p USING (id < 3)")
    reader.overrides["row_security"] = "filtered"
    assert (await move(reader, destination, plan_of("p"), context_of("run-2", 2))).rows == 3


async def test_what_can_not_be_read_is_refused_before_the_first_row_and_leaves_the_snapshot(reader: Server) -> None:
    await reader.execute(
        f"""
        CREATE TABLE secret (id int); REVOKE SELECT ON secret FROM {reader.overrides["username"]};
        GRANT SELECT (id) ON secret TO {reader.overrides["username"]}; ALTER TABLE secret ADD hidden int;
        CREATE MATERIALIZED VIEW unpopulated AS SELECT 1 AS id WITH NO DATA; CREATE TABLE plain (id int);
        """
    )
    async with registry.open_source("postgres", reader.config | reader.overrides).snapshot() as snapshot:
        with pytest.raises(ConnectorRefused, match="permission denied"):
            await snapshot.table(plan_of("secret"))
        with pytest.raises(ConnectorRefused, match="has not been populated"):
            await snapshot.table(plan_of("unpopulated"))
        with pytest.raises(ConnectorRefused, match="no column 'missing'"):
            await snapshot.table(plan_of("plain", ["missing"]))
        assert (await snapshot.table(plan_of("secret", ["id"]))).warnings == ()


MADE_OF = """
CREATE TABLE t AS SELECT n AS id, n AS size FROM generate_series(1, 100) AS n;
CREATE TABLE of_parts (id int) PARTITION BY RANGE (id);
CREATE TABLE part PARTITION OF of_parts FOR VALUES FROM (0) TO (1000);
CREATE TABLE other (id int); INSERT INTO other VALUES (2000);
INSERT INTO of_parts SELECT id FROM t;
CREATE VIEW seen AS SELECT t.id FROM t JOIN of_parts USING (id);
"""


@pytest.mark.parametrize(
    ("stream", "change"),
    [
        ("t", "TRUNCATE t; INSERT INTO t VALUES (1)"),
        ("t", "ALTER TABLE t ALTER size TYPE bigint"),
        ("seen", "TRUNCATE t"),
        ("seen", "TRUNCATE part"),
        ("of_parts", "TRUNCATE part"),
        ("of_parts", "ALTER TABLE of_parts DETACH PARTITION part"),
        ("of_parts", "ALTER TABLE of_parts ATTACH PARTITION other FOR VALUES FROM (2000) TO (3000)"),
    ],
)
async def test_what_was_made_anew_since_the_snapshot_is_not_read_as_empty(
    source: Server, stream: str, change: str
) -> None:
    await source.execute(MADE_OF)
    async with registry.open_source("postgres", source.config).snapshot() as snapshot:
        await source.execute(change)
        with pytest.raises(ConnectorUnavailable, match=rf"public\.{stream}: public\.\w+ was truncated") as refusal:
            await snapshot.table(plan_of(stream))
        assert refusal.value.code == "source_changed"
        assert await snapshot.is_usable()
    assert await _read(source, stream) == ()


async def test_a_view_of_a_table_that_stays_locked_is_not_waited_for_without_end(
    source: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await source.execute(MADE_OF)
    monkeypatch.setattr(relations, "LOCK_TIMEOUT_SECONDS", 0.1)
    async with source.connection.transaction():
        await source.execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(ConnectorUnavailable, match="lock timeout") as refusal:
            await _read(source, "seen")
        assert refusal.value.code == "locked"
    assert await _read(source, "seen") == ()


@pytest.mark.parametrize("threads", [1, 2])
async def test_a_sync_opens_no_more_connections_than_threads(
    reader: Server, destination: Server, lake: Lake, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr("libs.connectors.postgres.table.PART_PAGES_MIN", 2)
    await reader.execute("CREATE TABLE t AS SELECT n AS id, repeat('x', 500) AS note FROM generate_series(1, 2000) n")
    await reader.execute(f"ALTER ROLE {reader.overrides['username']} CONNECTION LIMIT {threads}")
    reader.overrides["max_threads"] = threads
    assert (await move(reader, destination, plan_of("t"))).rows == 2000
    assert (await move(reader, lake, plan_of("t"))).rows == 2000


async def test_a_read_that_fails_on_the_snapshots_connection_leaves_the_snapshot(source: Server) -> None:
    await source.execute("CREATE VIEW broken AS SELECT 1 / (n - 2) AS id FROM generate_series(1, 3) AS n")
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    config = PostgresSourceConfig.model_validate(source.config | {"max_threads": 1})
    async with PostgresSource(config).snapshot() as snapshot:
        table = await snapshot.table(plan_of("broken"))
        with pytest.raises(asyncpg.DivisionByZeroError):
            async with snapshot.reader() as connection:
                await connection.fetch(table.select(table.parts()[0]))
        await source.execute("INSERT INTO t VALUES (2)")
        other = await snapshot.table(plan_of("t"))
        async with snapshot.reader() as connection:
            assert len(await connection.fetch(other.select(other.parts()[0]))) == 1


async def test_identifiers_of_objects_arrive_as_text(source: Server, destination: Server, lake: Lake) -> None:
    """The same number, or name, is another object at the destination, or none."""
    await source.execute(
        """
        CREATE DOMAIN relation AS regclass; CREATE DOMAIN series AS int[];
        CREATE TYPE pair AS (relation regclass, n int);
        CREATE TABLE ids AS SELECT 't'::name AS name;
        CREATE TABLE t (
            id int, class regclass, proc regproc, procedure regprocedure, oper regoper, operator regoperator,
            type regtype, role regrole, namespace regnamespace, config regconfig, dictionary regdictionary,
            "collation" regcollation, acl aclitem, acls aclitem[], classes regclass[], grid regclass[][],
            domained relation, domains relation[], composed pair, composites pair[], nested series[], tree pg_node_tree,
            lsn pg_lsn, tuple tid, transaction xid, command cid, number oid, cursor refcursor, seen pg_snapshot
        );
        INSERT INTO t VALUES (
            1, 'ids', 'now', 'lower(text)', 'pg_catalog.||/', 'pg_catalog.+(integer,integer)', 'pair', 'postgres',
            'public', 'english', 'simple', '"C"', 'postgres=r/postgres', '{postgres=r/postgres,NULL}', '{ids,NULL}',
            '{{ids,t}}', 'ids', '{ids}', '(ids,1)', '{"(ids,1)"}', '{"{1,2}"}', NULL,
            '16/B374D848', '(3,4)', '7', '8', 16384, 'cursor', '10:20:10,14'
        );
        """
    )
    assert (await move(source, destination, plan_of("t"))).verified is True
    texts = {"class": "public.ids", "type": "public.pair", "role": "postgres", "config": "english", "oper": "||/"}
    texts |= {"classes": "{public.ids,NULL}", "grid": "{{public.ids,public.t}}", "domains": "{public.ids}"}
    texts |= {"nested": '{"{1,2}"}'}
    texts |= {"composed": "(public.ids,1)", "composites": '{"(public.ids,1)"}', "acls": "{postgres=r/postgres,NULL}"}
    for column, text in texts.items():
        found = await destination.value(f'SELECT "{column}"::text FROM t')
        assert found.replace("pg_catalog.", "") == text, column
    held = await destination.connection.fetch(
        "SELECT attname, format_type(atttypid, NULL) AS type FROM pg_attribute "
        "WHERE attrelid = 't'::regclass AND attnum > 0 ORDER BY attnum"
    )
    types = {row["attname"]: row["type"] for row in held}
    assert set(list(types.values())[1:13]) == {"text"}
    assert types["tree"] == types["composed"] == "text"
    assert types["classes"] == types["grid"] == types["domains"] == types["composites"] == types["acls"] == "text[]"
    assert types["nested"] == "text[]"
    numbers = "lsn, tuple, transaction, command, number, cursor, seen"
    assert await destination.rows("t", numbers) == await source.rows("t", numbers)
    assert list(types.values())[-7:] == ["pg_lsn", "tid", "xid", "cid", "oid", "refcursor", "pg_snapshot"]
    await move(source, lake, plan_of("t", policies={"grid": "text"}))
    (row,) = lake.rows("public/t")
    assert (row["class"], row["classes"], row["composed"]) == ("public.ids", ["public.ids", None], "(public.ids,1)")


async def test_no_setting_of_a_role_changes_a_value(source: Server, destination: Server) -> None:
    """Both ends use roles that are set to something else; the type of an extension's kind goes as text."""
    role = f"hostile_{source.config['database']}"
    await source.execute(f"CREATE ROLE {role} LOGIN SUPERUSER PASSWORD 'hostile'")
    try:
        for name, value in HOSTILE_SETTINGS.items():
            await source.execute(f"ALTER ROLE {role} SET {name} = {value}")
        await source.execute(
            r"""
            CREATE SCHEMA shadow; CREATE TYPE shadow.text AS (n int); CREATE TYPE pair AS (a text, b text[]);
            CREATE FUNCTION shadow.unnest(int2[]) RETURNS SETOF int2 LANGUAGE sql AS 'SELECT 99::int2';
            CREATE TABLE t AS SELECT 1 AS id, ARRAY['NULL', NULL, 'null'] AS texts,
                '\x00ff'::bytea AS raw, 0.1::float8 + 0.2 AS float, '2024-02-03'::date AS day,
                '2024-02-03 04:05:06+00'::timestamptz AS moment, '-1 day 02:03'::interval AS lasted,
                12.34::money AS price,
                ROW('back\slash ''quoted''', ARRAY[NULL, 'x'])::pair AS composed, 't'::text AS note,
                '☃ é'::text AS snow;
            ALTER TABLE t ADD PRIMARY KEY (id);
            """
        )
        await destination.execute("CREATE TYPE pair AS (a text, b text[])")
        hostile = {"username": role, "password": "hostile"}
        expected = await source.rows("t")
        source.overrides |= hostile
        destination.overrides |= hostile
        assert (await move(source, destination, plan_of("t"))).verified is True
        assert await destination.rows("t") == expected
        assert await destination.value("SELECT array_position(texts, NULL) FROM t") == 2
    finally:
        await destination.execute(f"REASSIGN OWNED BY {role} TO postgres; DROP OWNED BY {role}")
        await source.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.mark.parametrize("mode", ["disable", "allow", "prefer"])
async def test_nothing_of_the_environment_or_the_home_folder_is_read(
    source: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str
) -> None:
    hostile = str(tmp_path / "hostile")
    for name in ("HOST", "HOSTADDR", "DATABASE", "USER", "PASSWORD", "SERVICE", "SSLMODE", "SSLNEGOTIATION", "SSLCERT",
                 "SSLKEY", "SSLROOTCERT", "SSLCRL", "SSLMINPROTOCOLVERSION", "SSLMAXPROTOCOLVERSION", "GSSLIB",
                 "KRBSRVNAME", "TARGETSESSIONATTRS", "PASSFILE", "SERVICEFILE", "OPTIONS", "TZ"):  # fmt: skip
        monkeypatch.setenv(f"PG{name}", hostile)
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGTARGETSESSIONATTRS", "standby")
    monkeypatch.setenv("PGSSLNEGOTIATION", "direct")
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".postgresql").mkdir()
    for name in ("postgresql.crt", "postgresql.key", "root.crt", "root.crl"):
        (tmp_path / ".postgresql" / name).write_text("hostile")
    (tmp_path / ".pgpass").write_text("*:*:*:*:hostile")
    (tmp_path / ".pg_service.conf").write_text("[hostile]\nhost=hostile")
    await registry.open_source("postgres", source.config | {"ssl": {"mode": mode}}).check()


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
async def test_encrypted_connections_read_nothing_of_the_environment_either(
    source: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str
) -> None:
    """The server has no encryption, so its refusal is what shows that it was asked."""
    for name in ("SSLCERT", "SSLKEY", "SSLROOTCERT", "SSLCRL", "SSLMINPROTOCOLVERSION", "SSLNEGOTIATION"):
        monkeypatch.setenv(f"PG{name}", "hostile")
    with pytest.raises(ConnectorRefused, match="does not offer encrypted"):
        await registry.open_source("postgres", source.config | {"ssl": {"mode": mode}}).check()


async def test_a_message_names_the_column_and_not_the_value(source: Server, destination: Server) -> None:
    await source.execute(
        "CREATE TYPE pair AS (a text); CREATE TABLE t AS SELECT 1 AS id, ROW('secret')::pair AS \"odd one\""
    )
    await destination.execute("CREATE TYPE pair AS (a int)")
    with pytest.raises(ConnectorRefused) as refusal:
        await move(source, destination, plan_of("t"))
    assert refusal.value.message.count("line 1, column odd one") == 1
    assert '"secret"' in refusal.value.message
    assert refusal.value.message.count("secret") == 1


async def test_too_many_connections_pass(reader: Server) -> None:
    await reader.execute(f"ALTER ROLE {reader.overrides['username']} CONNECTION LIMIT 0")
    with pytest.raises(ConnectorUnavailable, match="too many connections") as refusal:
        await registry.open_source("postgres", reader.config | reader.overrides).check()
    assert refusal.value.code == "too_many_connections"
    await reader.execute(f"ALTER ROLE {reader.overrides['username']} CONNECTION LIMIT 2 NOLOGIN")
    with pytest.raises(ConnectorRefused, match="refused the credentials"):
        await registry.open_source("postgres", reader.config | reader.overrides).check()


async def test_tables_are_discovered_whatever_their_names(source: Server, destination: Server) -> None:
    """Only what DataSync keeps for itself is left out."""
    await source.execute("CREATE TABLE _datasync_mine (id int); CREATE TABLE _datasync_state (note text)")
    await source.execute("CREATE SCHEMA _datasync; CREATE TABLE _datasync.other (id int)")
    found = [entry["stream"] for entry in await registry.open_source("postgres", source.config).discover()]
    assert [(stream["namespace"], stream["name"]) for stream in found] == [
        ("_datasync", "other"),
        ("public", "_datasync_mine"),
        ("public", "_datasync_state"),
    ]
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    await move(source, destination, plan_of("t"))
    left = [entry["stream"]["name"] for entry in await registry.open_source("postgres", destination.config).discover()]
    assert left == ["t"]
