"""Incremental runs from PostgreSQL into Parquet files: which files change, and what they hold then."""

from dataclasses import replace
from typing import Any

import pytest

from libs.connectors.parquet import merging
from libs.connectors.protocol import ConnectorRefused, StreamPlan, Written
from tests.integration.connectors.moving import Lake, Server, context_of, move_changes, plan_of

ORDERS = """
CREATE TABLE orders (id integer PRIMARY KEY, amount numeric(10,2), note text, at timestamptz NOT NULL DEFAULT now());
INSERT INTO orders (id, amount, note) SELECT n, n * 1.5, 'note ' || n FROM generate_series(1, 100) AS n;
"""


class Runs:
    """Runs of one stream into a lake, one after the other."""

    def __init__(self, source: Server, lake: Lake, plan: StreamPlan) -> None:
        self.source, self.lake, self.plan = source, lake, plan
        self.number = 0

    async def __call__(self, *, deletes: bool = False, verify: bool = False) -> Written:
        self.number += 1
        context = context_of(f"run-{self.number}", self.number, verify=verify)
        return await move_changes(self.source, self.lake, self.plan, context, deletes=deletes)

    @property
    def table(self) -> str:
        return f"public/{self.plan.stream.name}"

    async def there(self, key: str = "id") -> list[dict[str, Any]]:
        return sorted(self.lake.rows(self.table), key=lambda row: row[key])

    async def equal(self, key: str = "id") -> bool:
        rows = await self.source.connection.fetch(f"SELECT * FROM {self.plan.stream.name} ORDER BY {key}")
        return [dict(row) for row in rows] == await self.there(key)

    @property
    def inodes(self) -> set[int]:
        return {file.stat().st_ino for file in self.lake.files(self.table)}


def merging_plan(table: str = "orders", **options: Any) -> StreamPlan:
    return replace(plan_of(table), mode="incremental", disposition="merge", **options)


@pytest.mark.parametrize("cursor", [None, "at", "id"])
async def test_a_run_merges_what_was_inserted_and_updated(source: Server, lake: Lake, cursor: str | None) -> None:
    await source.execute(ORDERS)
    run = Runs(source, lake, merging_plan(cursor=cursor))
    assert (await run()).inserted == 100
    await source.execute(
        "UPDATE orders SET amount = 0, at = now() WHERE id = 100; INSERT INTO orders (id, amount) VALUES (101, 5)"
    )
    second = await run()
    assert (second.inserted, second.updated) == (1, 1)
    assert await run.equal()
    before = run.inodes
    third = await run()
    assert (third.inserted, third.updated) == (0, 0)
    assert run.inodes == before


async def test_files_without_a_change_are_not_copied(
    source: Server, lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "MERGED_FILE_BYTES_MAX", 1)
    monkeypatch.setattr("libs.connectors.parquet.destination.MERGED_FILE_BYTES_MAX", 1)
    monkeypatch.setattr("libs.connectors.parquet.files.ROW_GROUP_ROWS_MAX", 1000)
    await source.execute("CREATE TABLE t (id integer PRIMARY KEY, note text)")
    await source.execute("INSERT INTO t SELECT n, md5(n::text) FROM generate_series(1, 60000) AS n")
    monkeypatch.setattr(merging, "SMALL_FILE_BYTES", 0)
    run = Runs(source, lake, merging_plan("t"))
    await run()
    before = run.inodes
    assert len(before) > 2
    await source.execute("UPDATE t SET note = 'x' WHERE id = 60000")
    await run()
    assert len(before - run.inodes) == 1
    assert await run.equal()


async def test_small_files_are_joined(source: Server, lake: Lake) -> None:
    await source.execute(ORDERS)
    run = Runs(source, lake, merging_plan())
    for number in range(merging.SMALL_FILES_MAX + 3):
        await source.execute(f"INSERT INTO orders (id, amount) VALUES ({1000 + number}, 1)")
        await run()
    assert len(lake.files(run.table)) <= merging.SMALL_FILES_MAX
    assert await run.equal()


async def test_deleted_rows_are_deleted(source: Server, lake: Lake) -> None:
    await source.execute(ORDERS)
    run = Runs(source, lake, merging_plan(deletes="hard"))
    await run()
    await source.execute("DELETE FROM orders WHERE id <= 10; UPDATE orders SET id = 1000 WHERE id = 50")
    written = await run(deletes=True, verify=True)
    assert (written.inserted, written.deleted, written.verified) == (1, 11, True)
    assert await run.equal()
    await source.execute("DELETE FROM orders")
    assert (await run(deletes=True)).deleted == 90
    assert await run.there() == []


async def test_deleted_rows_are_marked_and_unmarked(source: Server, lake: Lake) -> None:
    await source.execute(ORDERS)
    run = Runs(source, lake, merging_plan(deletes="soft"))
    await run()
    await source.execute("DELETE FROM orders WHERE id <= 10")
    assert (await run(deletes=True)).deleted == 10
    assert (await run(deletes=True)).deleted == 0
    marked = [row["id"] for row in await run.there() if row["_datasync_deleted_at"] is not None]
    assert marked == list(range(1, 11))
    await source.execute("INSERT INTO orders (id, amount) VALUES (1, 1)")
    assert (await run(deletes=True)).updated == 1
    assert (await run.there())[0]["_datasync_deleted_at"] is None


@pytest.mark.parametrize("cursor", [None, "at", "id"])
async def test_appended_rows_are_appended_once(source: Server, lake: Lake, cursor: str | None) -> None:
    await source.execute(ORDERS)
    run = Runs(source, lake, replace(merging_plan(cursor=cursor), disposition="append"))
    await run()
    await source.execute("INSERT INTO orders (id, amount) VALUES (101, 1)")
    assert (await run()).inserted == 1
    assert (await run()).inserted == 0
    assert await run.equal()


async def test_a_full_refresh_may_append(source: Server, lake: Lake) -> None:
    await source.execute(ORDERS)
    run = Runs(source, lake, replace(plan_of("orders"), disposition="append"))
    await run()
    assert (await run()).inserted == 100
    assert len(lake.rows(run.table)) == 200


async def test_new_and_widened_columns_are_taken_over(source: Server, lake: Lake) -> None:
    await source.execute(ORDERS)
    run = Runs(source, lake, merging_plan())
    await run()
    await source.execute(
        "ALTER TABLE orders ADD COLUMN extra text DEFAULT 'x', ALTER COLUMN id TYPE bigint, DROP COLUMN note"
    )
    await run()
    await source.execute("INSERT INTO orders (id, amount) VALUES (9999999999, 1)")
    await run()
    rows = await run.there()
    assert {row["extra"] for row in rows} == {"x"}
    assert [row["note"] for row in rows[:2]] == ["note 1", "note 2"]
    assert (rows[-1]["id"], rows[-1]["note"]) == (9999999999, None)


async def test_a_narrowed_column_is_refused_by_name(source: Server, lake: Lake) -> None:
    await source.execute(ORDERS)
    run = Runs(source, lake, merging_plan())
    await run()
    await source.execute("ALTER TABLE orders ALTER COLUMN amount TYPE numeric(8,1)")
    with pytest.raises(ConnectorRefused, match="column amount changes") as refused:
        await run()
    assert refused.value.code == "schema_changed"


async def test_rows_of_any_key_are_merged(source: Server, lake: Lake) -> None:
    await source.execute(
        """
        CREATE TABLE t (tenant text, id uuid, day date, n numeric(20,5), v integer, PRIMARY KEY (tenant, id, day, n));
        INSERT INTO t SELECT 't' || n % 3, gen_random_uuid(), '2024-01-01'::date + n, n / 7.0, n
        FROM generate_series(1, 500) AS n;
        """
    )
    run = Runs(source, lake, merging_plan("t", deletes="hard"))
    await run()
    await source.execute("UPDATE t SET v = v + 1000 WHERE v % 5 = 0; DELETE FROM t WHERE v % 7 = 1")
    written = await run(deletes=True, verify=True)
    assert written.verified is True
    assert written.deleted > 50


async def test_a_target_whose_files_are_gone_is_refused_by_name(source: Server, lake: Lake) -> None:
    await source.execute(ORDERS)
    run = Runs(source, lake, merging_plan())
    await run()
    lake.files(run.table)[0].unlink()
    with pytest.raises(ConnectorRefused, match="no longer has the file") as refused:
        await run()
    assert refused.value.code == "target_differs"
