"""From PostgreSQL into Parquet files: values survive, readers see one version, older epochs are kept out."""

import asyncio
import datetime as dt
import json
import uuid
from collections import Counter
from decimal import Decimal
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from libs.connectors import registry
from libs.connectors.protocol import ConnectorRefused, ConnectorUnavailable, Fenced, StreamName, StreamPlan, Target
from tests.integration.connectors.moving import (
    BEYOND_PARQUET,
    EVERY_TYPE,
    Counts,
    Lake,
    Server,
    context_of,
    move,
    plan_of,
)


async def test_every_type_is_read_back_without_loss(source: Server, lake: Lake) -> None:
    await source.execute(EVERY_TYPE)
    counts = Counts()
    written = await move(source, lake, progress=counts)
    assert (written.rows, written.verified) == (4, True)
    assert counts.rows_read == counts.rows_written == 4
    first, empty, third, fourth = sorted(lake.rows(), key=lambda row: row["id"])
    assert first == EVERY_VALUE
    assert {key: value for key, value in empty.items() if value is not None} == {"id": 2}
    assert str(third["real4"]) == "nan"
    assert third["real8"] == float("-inf")
    assert (third["note"], third["padded"], third["raw"], third["numbers"]) == ("", " " * 6, b"", [])
    assert (fourth["free"], fourth["real8"], fourth["lasted"]) == (f"1{'0' * 100}", 1e-300, "P178000000Y")
    assert str(fourth["real4"]) == "-0.0"
    assert len(fourth["raw"]) == 100_000


async def test_other_readers_see_the_same_values(source: Server, lake: Lake) -> None:
    """DuckDB reads the files as PostgreSQL shows the rows: exact numbers, zoned times, dates of any age."""
    await source.execute(EVERY_TYPE)
    await move(source, lake)
    with duckdb.connect() as reader:
        columns = "exact::text, whole::text, tiny, free, epoch_us(seen), key, words, prices"
        query = f"SELECT {columns} FROM '{lake.path}/public/everything/*.parquet' WHERE id = 1"
        assert reader.execute(query).fetchone() == (
            "1234567890.12",
            "12300",
            Decimal("0.00123"),
            "3.14159265358979323846264338327950288419716939937510",
            1_711_841_400_123_456,
            uuid.UUID("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
            ["a", "", None, "NULL", 'with "quotes"'],
            [Decimal("1.10"), None, Decimal("99999.99")],
        )
        old = f"SELECT day::text FROM '{lake.path}/public/everything/*.parquet' WHERE id >= 3 ORDER BY id"
        assert [row[0] for row in reader.execute(old).fetchall()] == ["0001-01-01 (BC)", "5874897-12-31"]


async def test_numbers_of_every_precision_and_scale_are_exact(source: Server, lake: Lake) -> None:
    shapes = [
        (p, s) for p in (1, 4, 5, 9, 12, 16, 17, 18, 19, 38, 39, 76) for s in (-3, 0, 1, 2, 4, 7, p - 1, p, p + 2)
    ]
    await source.execute(f"CREATE TABLE t ({', '.join(f'n{i} numeric({p},{s})' for i, (p, s) in enumerate(shapes))})")
    for part in (1, 3, 10, 9_999, 10_000, 123_456_789):
        numbers = [f"k * {(10**p - 1) // part}e{-s}" for p, s in shapes]
        await source.execute(f"INSERT INTO t SELECT {', '.join(numbers)} FROM unnest(ARRAY[-1, 0, 1, NULL]) AS k")
    await move(source, lake, plan_of("t"))
    for index in range(len(shapes)):
        sent = [row["value"] for row in await source.connection.fetch(f"SELECT n{index}::text AS value FROM t")]
        # More than 76 digits arrive as text.
        arrived = [row[f"n{index}"] for row in lake.rows("public/t")]
        exact = [Counter(None if value is None else Decimal(value) for value in values) for values in (sent, arrived)]
        assert exact[0] == exact[1]


async def test_long_values_and_arrays_are_read_back(source: Server, lake: Lake) -> None:
    """Values that are longer than a batch, and arrays of very different lengths."""
    await source.execute(
        """
        CREATE TABLE t AS SELECT n AS id, repeat(md5(n::text), CASE n WHEN 7 THEN 200000 ELSE n % 4 END) AS note,
            (SELECT array_agg(CASE WHEN i % 3 > 0 THEN repeat('é', i % 5) END) FROM generate_series(1, n * n % 700) i)
            AS words, to_jsonb(ARRAY[n, n]) AS doc, ARRAY[to_jsonb(n), NULL] AS docs, ARRAY[n::numeric(40,3)] AS sums
        FROM generate_series(1, 300) n
        """
    )
    written = await move(source, lake, plan_of("t"))
    assert (written.rows, written.verified) == (300, True)
    found = await source.connection.fetch("SELECT id, note, words, doc, docs, sums FROM t ORDER BY id")
    assert sorted(lake.rows("public/t"), key=lambda row: row["id"]) == [dict(row) for row in found]


@pytest.mark.parametrize("column", ["exact", "day", "at", "seen", "clock", "numbers", "days"])
async def test_a_value_that_parquet_lacks_fails_by_name_and_leaves_the_files(
    source: Server, lake: Lake, column: str
) -> None:
    await source.execute(EVERY_TYPE)
    await move(source, lake, plan_of(columns=["id", column]))
    before = lake.rows()
    await source.execute(BEYOND_PARQUET)
    with pytest.raises(ConnectorRefused, match=f"column '{column}' has a value that the destination can't hold"):
        await move(source, lake, plan_of(columns=["id", column]), context_of("run-2", 2))
    assert lake.rows() == before
    assert _left_over(lake) == []


async def test_policies_make_such_values_null_or_text(source: Server, lake: Lake) -> None:
    await source.execute(EVERY_TYPE + BEYOND_PARQUET)
    columns = ["exact", "day", "at", "seen", "clock", "numbers", "days"]
    await move(source, lake, plan_of(columns=["id", *columns], policies=dict.fromkeys(columns, "null")))
    rows = sorted(lake.rows(), key=lambda row: row["id"])
    assert [row[column] for row in rows[-2:] for column in columns] == [None] * 14
    assert rows[0]["day"] == dt.date(2024, 2, 29)
    plan = plan_of(columns=["id", "free", *columns], policies=dict.fromkeys(columns, "text"))
    await move(source, lake, plan, context_of("run-2", 2))
    fifth, sixth = sorted(lake.rows(), key=lambda row: row["id"])[-2:]
    assert [fifth[column] for column in columns] == [
        "NaN",
        "infinity",
        "-infinity",
        "infinity",
        "24:00:00",
        "{{1,2},{3,4}}",
        "{infinity}",
    ]
    assert (fifth["free"], sixth["free"], sixth["numbers"]) == ("NaN", "Infinity", "[2:3]={1,2}")


@pytest.mark.parametrize("definition", ["(id int PRIMARY KEY, note text)", "(note text)"])
async def test_an_empty_table_makes_a_file_that_carries_the_schema(source: Server, lake: Lake, definition: str) -> None:
    await source.execute(f"CREATE TABLE nothing {definition}")
    written = await move(source, lake, plan_of("nothing"))
    assert (written.rows, written.verified) == (0, True)
    (file,) = lake.files("public/nothing")
    assert "note" in pq.read_schema(file).names


async def test_a_large_table_arrives_whole_from_several_connections(
    source: Server, lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("libs.connectors.postgres.table.PART_PAGES_MIN", 50)
    await source.execute("CREATE TABLE many AS SELECT n AS id, md5(n::text) AS note FROM generate_series(1, 200000) n")
    written = await move(source, lake, plan_of("many"))
    assert (written.rows, written.verified) == (200_000, True)
    with duckdb.connect() as reader:
        found = reader.execute(f"SELECT count(*), count(DISTINCT id), sum(id) FROM '{lake.path}/public/many/*.parquet'")
        assert found.fetchone() == (200_000, 200_000, 20_000_100_000)
    compression = {pq.read_metadata(file).row_group(0).column(0).compression for file in lake.files("public/many")}
    assert compression == {"ZSTD"}


async def test_a_reader_that_has_listed_one_version_never_opens_another(source: Server, lake: Lake) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    await move(source, lake, plan_of("t"), context_of("run-1", 1))
    listed = lake.files("public/t")
    with pq.ParquetFile(listed[0]) as opened:
        await source.execute("UPDATE t SET id = 2")
        await move(source, lake, plan_of("t"), context_of("run-2", 2))
        assert opened.read()["id"].to_pylist() == [1]
    assert [row["id"] for row in lake.rows("public/t")] == [2]
    assert not any(file.exists() for file in listed)


async def test_an_older_epoch_can_not_publish(source: Server, lake: Lake) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    async with (
        registry.open_source("postgres", source.config).snapshot() as snapshot,
        lake.destination().open(context_of("run-1", 1)) as paused,
    ):
        table = await snapshot.table(plan_of("t"))
        await source.execute("UPDATE t SET id = 2")
        await move(source, lake, plan_of("t"), context_of("run-2", 2))
        with pytest.raises(Fenced):
            await paused.write(table, Counts())
    with pytest.raises(Fenced):
        await move(source, lake, plan_of("t"), context_of("run-1", 1))
    assert [row["id"] for row in lake.rows("public/t")] == [2]
    assert _left_over(lake) == []


async def test_what_a_killed_worker_staged_is_removed_by_the_next(source: Server, lake: Lake) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    staged = lake.path / "_datasync/staging/job-1-epoch-1/public.t-x"
    unnamed = lake.path / "_datasync/versions/job-1-epoch-1-0123"
    for folder in (staged, unnamed):
        folder.mkdir(parents=True)
        (folder / "part-0-00000.parquet").write_bytes(b"half")
    await move(source, lake, plan_of("t"), context_of("run-1", 2))
    assert not staged.exists()
    assert not unnamed.exists()


async def test_foreign_files_are_not_touched(source: Server, lake: Lake) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    (lake.path / "public/t").mkdir(parents=True)
    (lake.path / "public/t/mine.parquet").write_bytes(b"mine")
    with pytest.raises(ConnectorRefused, match="was not written by DataSync"):
        await move(source, lake, plan_of("t"))
    assert (lake.path / "public/t/mine.parquet").read_bytes() == b"mine"


async def test_names_that_no_folder_can_have_are_encoded(source: Server, lake: Lake) -> None:
    await source.execute('CREATE TABLE "../a/b" AS SELECT 1 AS id')
    await move(source, lake, plan_of("../a/b"))
    assert [row["id"] for row in lake.rows("public/%2E.%2Fa%2Fb")] == [1]


async def test_the_longest_names_of_all_fit(source: Server, lake: Lake) -> None:
    """63 bytes each, which become 183 when they are encoded."""
    name = "é-" * 21
    await source.execute(f'CREATE SCHEMA "{name}"; CREATE TABLE "{name}"."{name}" AS SELECT 1 AS id')
    written = await move(source, lake, StreamPlan(StreamName(name, name), Target(name, name), None))
    assert written.rows == 1
    assert [path.parent.parent.parent for path in lake.path.glob("%*/%*/*.parquet")] == [lake.path]


async def test_a_directory_that_can_not_be_made_is_refused(source: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    lake = Lake(tmp_path / "file" / "lake")
    with pytest.raises(ConnectorRefused, match="can't be used"):
        await lake.destination().check()
    with pytest.raises(ConnectorRefused, match="can't be used"):
        await move(source, lake, plan_of("t"))


async def test_a_full_disk_is_said_and_leaves_the_files(
    source: Server, lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    await move(source, lake, plan_of("t"), context_of("run-1", 1))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("libs.connectors.parquet.files.os.fsync", full)
    with pytest.raises(ConnectorUnavailable, match="no space is left"):
        await move(source, lake, plan_of("t"), context_of("run-2", 2))
    monkeypatch.undo()
    assert [row["id"] for row in lake.rows("public/t")] == [1]
    assert _left_over(lake) == []


async def test_a_cancelled_run_lets_go_of_the_source(source: Server, lake: Lake) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    await source.execute("CREATE VIEW slow AS SELECT id, pg_sleep(30)::text AS nap FROM t")
    counts = Counts()
    moving = asyncio.create_task(move(source, lake, plan_of("slow"), progress=counts))
    napping = (
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database())"
    )
    while not await source.value(napping):
        await asyncio.sleep(0.02)
    moving.cancel()
    async with asyncio.timeout(5):
        with pytest.raises(asyncio.CancelledError):
            await moving
    async with asyncio.timeout(5):
        while await source.value(napping):
            await asyncio.sleep(0.02)
    assert _left_over(lake) == []


async def test_clearing_removes_the_files(source: Server, lake: Lake) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    await move(source, lake, plan_of("t"), context_of("run-1", 1))
    async with lake.destination().open(context_of("run-2", 2)) as run:
        await run.clear(plan_of("t"))
        await run.clear(plan_of("never"))
    assert lake.files("public/t") == []
    await move(source, lake, plan_of("t"), context_of("run-3", 3))
    assert [row["id"] for row in lake.rows("public/t")] == [1]


@pytest.mark.parametrize(("job_id", "project_id"), [(2, 1), (1, 2)])
async def test_a_table_of_another_job_is_neither_replaced_nor_cleared(
    source: Server, lake: Lake, job_id: int, project_id: int
) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    await move(source, lake, plan_of("t"), context_of())
    counts = Counts()
    other = context_of("run-2", 2, job_id=job_id, project_id=project_id)
    with pytest.raises(ConnectorRefused, match=r"public/t is written by job 1") as refusal:
        await move(source, lake, plan_of("t"), other, counts)
    assert (refusal.value.code, counts.rows_read) == ("target_shared", 0)
    async with lake.destination().open(other) as run:
        with pytest.raises(ConnectorRefused, match="is written by job 1"):
            await run.clear(plan_of("t"))
    assert [row["id"] for row in lake.rows("public/t")] == [1]


async def test_a_table_that_another_job_publishes_meanwhile_is_kept(source: Server, lake: Lake) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    async with (
        registry.open_source("postgres", source.config).snapshot() as snapshot,
        lake.destination().open(context_of("run-2", job_id=2)) as run,
    ):
        table = await snapshot.table(plan_of("t"))
        await run.prepare(table)
        await source.execute("UPDATE t SET id = 7")
        await move(source, lake, plan_of("t"), context_of())
        with pytest.raises(ConnectorRefused, match="is written by job 1"):
            await run.write(table, Counts())
    assert [row["id"] for row in lake.rows("public/t")] == [7]


async def test_entries_without_a_project_are_told_by_their_job(source: Server, lake: Lake) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    await move(source, lake, plan_of("t"), context_of())
    for path in (lake.path / "_datasync").glob("*.json"):
        entry = json.loads(path.read_bytes())
        del entry["project_id"]
        path.write_text(json.dumps(entry))
    with pytest.raises(ConnectorRefused, match="is written by job 1"):
        await move(source, lake, plan_of("t"), context_of("run-2", job_id=2))
    assert (await move(source, lake, plan_of("t"), context_of("run-3", 2))).rows == 1


def _left_over(lake: Lake) -> list[Path]:
    return [path for path in (lake.path / "_datasync/staging").rglob("*") if path.is_file()]


EVERY_VALUE = {
    "id": 1,
    "small": -32768,
    "big": 9223372036854775807,
    "real4": pytest.approx(1.1, rel=1e-7),
    "real8": 0.1,
    "exact": Decimal("1234567890.12"),
    "wide": Decimal("1234567890123456789012345678901234567890.0123456789"),
    "whole": Decimal(12300),
    "tiny": Decimal("0.00123"),
    "free": "3.14159265358979323846264338327950288419716939937510",
    "flag": True,
    "note": "tab\t, newline\n, quote \"' and \\ ünï ☃",
    "short": "abc",
    "padded": "ab    ",
    "ident": "ident",
    "raw": b"\x00\xff\n\\",
    "day": dt.date(2024, 2, 29),
    "at": dt.datetime(2024, 2, 29, 23, 59, 59, 999999),  # noqa: DTZ001
    "seen": dt.datetime(2024, 3, 30, 23, 30, 0, 123456, tzinfo=dt.UTC),
    "clock": dt.time(23, 59, 59, 999999),
    "zoned": "12:34:56.789+05:30",
    "lasted": "P10M3DT-4H-5M-6.789S",
    "key": uuid.UUID("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
    "doc": '{"b":1,  "a": [1.10, null]}',
    "bin": '{"a": "☃", "b": 1.10}',
    "feeling": 'so "so"',
    "count": 7,
    "paid": Decimal("1234567890123456.7891"),
    "numbers": [1, None, 3],
    "words": ["a", "", None, "NULL", 'with "quotes"'],
    "prices": [Decimal("1.10"), None, Decimal("99999.99")],
    "grid": [1, 2],
    "moods": ["sad", None, 'so "so"'],
    "counts": [1, 2],
    "days": [dt.date(2024, 1, 1), None],
    "keys": [uuid.UUID("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11")],
    "blobs": [b"\x00\xff"],
    "spans": ["P1D", "PT-1H"],
    "address": "10.0.0.1/8",
    "period": "[1,5)",
    'Odd "name': "x",
}
