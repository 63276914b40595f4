"""What a run that verifies says: equal, different and in which rows, or not comparable and why."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pyarrow as pa
import pytest

from libs.connectors import comparison, registry
from libs.connectors.comparison import Comparison, EndsDiffer
from libs.connectors.parquet.verification import ParquetEnd
from libs.connectors.postgres import binary
from libs.connectors.postgres.verification import compare as compare_with_postgres
from libs.testing.databases import new_database
from libs.testing.servers import Postgres
from tests.integration.connectors.moving import BEYOND_PARQUET, EVERY_TYPE, Lake, Server, context_of, move, plan_of

# What EVERY_TYPE leaves out, with values that have several forms in memory.
MORE_TYPES = """
CREATE TYPE point3 AS (x integer, label text, at timestamptz);
CREATE TYPE mood AS ENUM ('sad', 'glad');
CREATE DOMAIN short AS varchar(10);
CREATE DOMAIN shorts AS varchar(10)[];
CREATE TABLE more (
    id integer PRIMARY KEY, place point3, places point3[], feeling mood, code short, codes shorts, fixed bit(5),
    bits bit varying(9), price money, page xml, net cidr, mac macaddr, wal pg_lsn, span tsrange, spans numrange[],
    search tsvector, query tsquery, spot point, shape polygon, cube integer[][][], shifted integer[],
    reals real[], padded char(4)[], names name[], docs json[], bins jsonb[], one "char", old oid, path jsonpath
);
INSERT INTO more VALUES (
    1, ROW(1, 'é, "x"', '2024-01-01 00:00+02'), ARRAY[ROW(1, NULL, NULL)::point3, NULL], 'glad', 'é', '{a,NULL}',
    '10101', '101', 12.34, NULL, '10.0.0.0/8', '08:00:2b:01:02:03', '16/B374D848', '[2024-01-01,)', '{"[1,2)",empty}',
    'a fat cat', 'fat & !rat', '(0.1,-0)', '((0,0),(1e-9,1))', '{{{1,NULL},{3,4}}}', '[5:6]={1,2}',
    '{NaN,-0,1.1}', '{a,"b c"}', '{x}', ARRAY['{"a": 1}'::json], ARRAY['{"b":1,"a":2}'::jsonb, NULL], 'z', 4000000000,
    '$.a[*]'
);
INSERT INTO more VALUES (2);
UPDATE more SET reals = ARRAY['inf'::real - 'inf'::real] WHERE id = 2;
"""


@asynccontextmanager
async def table_of(source: Server, name: str = "t") -> AsyncIterator[Any]:
    async with registry.open_source("postgres", source.config).snapshot() as snapshot:
        yield await snapshot.table(plan_of(name))


async def compared(source: Server, end: Server | Lake, name: str = "t") -> Comparison:
    """What stands at the destination now with what stands at the source now."""
    async with table_of(source, name) as table:
        if isinstance(end, Server):
            return await compare_with_postgres(table, end.connection, ("public", name))
        here = table.comparable()
        files = ParquetEnd(end.files(f"public/{name}"), table.arrow_schema, here.columns, here.key)
        return await comparison.compare(table.plan.stream, here, files)


@pytest.fixture(params=["PostgreSQL", "Parquet"])
def there(request: pytest.FixtureRequest, destination: Server, lake: Lake) -> Server | Lake:
    """Each kind of destination."""
    return destination if request.param == "PostgreSQL" else lake


@pytest.fixture
async def latin(postgres_server: Postgres) -> AsyncIterator[Server]:
    async with (
        new_database(postgres_server, "ENCODING LATIN1 TEMPLATE template0") as dsn,
        Server.connected(dsn) as server,
    ):
        yield server


async def test_every_type_that_arrives_is_equal(source: Server, there: Server | Lake) -> None:
    await source.execute(MORE_TYPES)
    columns = [
        row["attname"]
        for row in await source.connection.fetch(
            "SELECT attname FROM pg_attribute WHERE attrelid = 'more'::regclass AND attnum > 0"
        )
    ]
    if isinstance(there, Server):
        await there.execute("CREATE TYPE point3 AS (x integer, label text, at timestamptz)")
        written = await move(source, there, plan_of("more"))
    else:
        columns = [name for name in columns if name not in ("cube", "shifted")]
        written = await move(source, there, plan_of("more", columns))
    assert written.verified is True
    assert written.verification is not None
    assert written.verification["columns"] == columns
    assert written.verification["rows"] == 2
    assert written.verification["source"] == written.verification["destination"]


@pytest.mark.parametrize(
    ("fault", "column"),
    [
        ("_since_1970", "day"),
        ("_decimal", "exact"),
        ("_text", "note"),
        ("_list", "numbers"),
        ("_fixed", "big"),
    ],
)
async def test_a_fault_of_the_decoder_fails_the_run_and_names_the_row(
    source: Server, lake: Lake, monkeypatch: pytest.MonkeyPatch, fault: str, column: str
) -> None:
    await source.execute(EVERY_TYPE)
    await move(source, lake, plan_of(columns=["id", column]))
    before = lake.rows()
    right = getattr(binary, fault)

    def wrong(*arguments: Any) -> Any:
        decoded = right(*arguments)
        if fault == "_since_1970":
            return decoded + 1
        if pa.types.is_null(decoded.type) or decoded.type == pa.int32():
            return decoded
        return pa.concat_arrays([pa.nulls(1, decoded.type), decoded[1:]])

    monkeypatch.setattr(binary, fault, wrong)
    with pytest.raises(
        EndsDiffer, match=r"public\.everything: source and destination differ .* different: \(id = [1-4]\)"
    ) as differ:
        await move(source, lake, plan_of(columns=["id", column]), context_of("run-2", 2))
    assert differ.value.code == "verification_failed"
    assert differ.value.document["examples"]["different"]
    monkeypatch.undo()
    assert lake.rows() == before


@pytest.mark.parametrize("rows_listed", [10_000, 3])
async def test_rows_that_differ_are_named_by_their_keys(
    source: Server, there: Server | Lake, monkeypatch: pytest.MonkeyPatch, rows_listed: int
) -> None:
    monkeypatch.setattr(comparison, "ROWS_LISTED_MAX", rows_listed)
    create = "CREATE TABLE t (id int, part text, note text, PRIMARY KEY (part, id))"
    await source.execute(f"{create}; INSERT INTO t SELECT n, 'é' || n % 3, 'x' FROM generate_series(1, 20000) n")
    await move(source, there, plan_of("t"), context_of(verify=False))
    assert (await compared(source, there)).verified is True
    for change, kind in (
        ("UPDATE t SET note = 'secret' WHERE id = 7", "different"),
        ("DELETE FROM t WHERE id = 7", "extra"),
        ("INSERT INTO t VALUES (7, 'é1', 'x'), (20001, 'new', 'x')", "missing"),
    ):
        await source.execute(change)
        with pytest.raises(EndsDiffer) as differ:
            await compared(source, there)
        document = differ.value.document
        key = ["20001", "new"] if kind == "missing" else ["7", "é1"]
        assert document["key"] == ["part", "id"] or document["key"] == ["id", "part"]
        assert document["examples"] == {"missing": [], "extra": [], "different": []} | {kind: [key[::-1]]}
        assert document["buckets_differing"] == len(document["buckets"]) == 1
        assert "secret" not in str(differ.value)
        assert f"part = {key[1]}, id = {key[0]}" in str(differ.value)


async def test_without_a_key_repeated_rows_are_counted(source: Server, there: Server | Lake) -> None:
    await source.execute("CREATE TABLE t AS SELECT n % 2 AS id, NULL::text AS note FROM generate_series(1, 8) n")
    await move(source, there, plan_of("t"))
    await source.execute("INSERT INTO t VALUES (1), (1)")
    with pytest.raises(EndsDiffer, match="10 rows at the source, 8 at the destination; 1 of 256 buckets") as differ:
        await compared(source, there)
    assert "examples" not in differ.value.document
    (bucket,) = differ.value.document["buckets"]
    assert (bucket["source"]["rows"], bucket["destination"]["rows"]) == (6, 4)


@pytest.mark.parametrize(
    ("view", "reason"),
    [
        ("SELECT id, random() AS value FROM t", r"volatile function random\(\)"),
        ("SELECT id, 1 AS value FROM t WHERE own(id) > 0", r"volatile function public\.own\(integer\)"),
        ("SELECT * FROM (SELECT id, statement_timestamp() AS value FROM t) AS t", "depends on the current time"),
        ("SELECT id, unsteady() AS value FROM t", "returned other rows when it was read again in the same snapshot"),
    ],
)
async def test_a_view_that_gives_other_rows_each_time_is_not_comparable(
    source: Server, there: Server | Lake, view: str, reason: str
) -> None:
    await source.execute(
        "CREATE FUNCTION own(int) RETURNS int LANGUAGE sql AS 'SELECT $1';"
        "CREATE FUNCTION unsteady() RETURNS timestamptz LANGUAGE plpgsql STABLE"
        " AS 'BEGIN RETURN clock_timestamp(); END';"
        f"CREATE TABLE t AS SELECT 1 AS id; CREATE VIEW inner_v AS {view}; CREATE VIEW v AS SELECT * FROM inner_v"
    )
    written = await move(source, there, plan_of("v"))
    assert (written.rows, written.verified) == (1, None)
    assert written.verification is not None
    assert written.verification["comparable"] is False
    assert re.search(reason, written.verification["reason"])


@pytest.mark.parametrize(
    ("view", "by_time"),
    [
        ("SELECT CURRENT_DATE AS day", True),
        ("SELECT now() - interval '1 day' AS yesterday", True),
        ("SELECT LOCALTIMESTAMP(2) AS at", True),
        ("SELECT CURRENT_USER AS me, CURRENT_CATALOG AS here, upper('a') AS letter", False),
    ],
)
async def test_a_view_that_depends_on_the_time_is_told_by_its_definition(
    source: Server, view: str, by_time: bool
) -> None:
    """Readings in one transaction are equal, in several they need not be."""
    await source.execute(f"CREATE VIEW v AS {view}")
    async with table_of(source, "v") as table:
        reason = await table.comparable().why_different()
    assert (reason is not None) is by_time


async def test_a_steady_view_and_what_is_stored_of_a_volatile_one_are_compared(
    source: Server, there: Server | Lake
) -> None:
    await source.execute(
        "CREATE TABLE t AS SELECT 1 AS id; CREATE MATERIALIZED VIEW stored AS SELECT id, random() AS value FROM t;"
        "CREATE VIEW v AS SELECT id, value, upper('a') AS letter FROM stored"
    )
    for epoch, name in enumerate(("stored", "v"), 1):
        written = await move(source, there, plan_of(name), context_of(f"run-{epoch}", epoch))
        assert written.verified is True, written.verification


async def test_texts_of_another_encoding_are_equal(latin: Server, destination: Server, lake: Lake) -> None:
    await latin.execute(
        "CREATE TYPE mood AS ENUM ('gaîté');"
        "CREATE TABLE t (id text PRIMARY KEY, words text[], doc jsonb, feeling mood);"
        """INSERT INTO t VALUES ('é', '{"ü",NULL}', '{"é": 1, "zz": 2}', 'gaîté')"""
    )
    assert (await move(latin, lake, plan_of("t"))).verified is True
    written = await move(latin, destination, plan_of("t"))
    assert written.verified is True
    assert written.verification is not None
    assert written.verification["columns"] == ["id", "words", "feeling"]
    assert "LATIN1 and UTF8" in written.verification["columns_not_compared"]["doc"]
    await destination.execute("UPDATE t SET words = '{u}'")
    with pytest.raises(EndsDiffer, match=r"different: \(id = é\)"):
        await compared(latin, destination)


@pytest.mark.parametrize("copy", ["binary", "text"])
async def test_values_with_several_forms_are_equal(source: Server, destination: Server, lake: Lake, copy: str) -> None:
    """A NaN with its sign set, which a copy as text loses; an array whose null was overwritten."""
    await source.execute(
        "CREATE TYPE mood AS ENUM ('sad');"
        f"CREATE TABLE t (id int PRIMARY KEY, x float8, y float4, xs float8[], n int[]{', m mood' * (copy == 'text')});"
        "INSERT INTO t VALUES (1, 'inf'::float8 - 'inf'::float8, 'inf'::float4 - 'inf'::float4,"
        " ARRAY['inf'::float8 - 'inf'::float8, '-0'], '{1,NULL,3}'); UPDATE t SET n[2] = 2"
    )
    assert await source.value("SELECT float8send(x) FROM t") != await source.value("SELECT float8send('NaN')")
    assert (await move(source, destination, plan_of("t"))).verified is True
    assert (await move(source, lake, plan_of("t"))).verified is True


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("policy", ["null", "text"])
async def test_values_that_a_policy_changed_are_counted(source: Server, lake: Lake, verify: bool, policy: Any) -> None:
    await source.execute(EVERY_TYPE + BEYOND_PARQUET + "INSERT INTO everything (id, day) VALUES (7, 'infinity')")
    columns = ["exact", "day", "at", "seen", "clock", "numbers", "days"]
    plan = plan_of(columns=["id", "note", *columns], policies=dict.fromkeys(["note", *columns], policy))
    written = await move(source, lake, plan, context_of(verify=verify))
    assert written.values_changed == dict.fromkeys(columns, 2) | {"day": 3}
    assert written.verified is (True if verify else None)
    async with lake.destination().open(context_of("run-1", 2)) as resumed:
        committed = await resumed.committed(plan)
    assert committed == written


async def test_a_value_that_a_policy_made_null_is_no_pretext_for_another(source: Server, lake: Lake) -> None:
    await source.execute("CREATE TABLE t AS SELECT n AS id, date '2024-01-01' + n AS day FROM generate_series(1, 3) n")
    plan = plan_of("t", policies={"day": "null"})
    await move(source, lake, plan)
    await source.execute("UPDATE t SET day = 'infinity' WHERE id = 2")
    async with registry.open_source("postgres", source.config).snapshot() as snapshot:
        table = await snapshot.table(plan)
        end = table.comparable()
        files = ParquetEnd(lake.files("public/t"), table.arrow_schema, end.columns, end.key)
        with pytest.raises(EndsDiffer, match="3 rows at the source, 3 at the destination; 2 of 256"):
            await comparison.compare(plan.stream, end, files)


async def test_files_of_another_schema_are_refused(source: Server, lake: Lake) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    await move(source, lake, plan_of("t"))
    await source.execute("ALTER TABLE t ALTER id TYPE bigint")
    with pytest.raises(Exception, match="does not have the columns that were written"):
        await compared(source, lake)
