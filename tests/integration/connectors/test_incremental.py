"""Incremental runs from PostgreSQL to PostgreSQL: what is read, merged, appended and deleted."""

import asyncio
from dataclasses import replace

import pytest

from libs.connectors.protocol import ConnectorRefused, StreamPlan, Written
from libs.contracts.filters import parse_filter
from tests.integration.connectors.moving import Server, context_of, move_changes, plan_of

ORDERS = """
CREATE TABLE orders (id integer PRIMARY KEY, amount numeric, note text, at timestamptz NOT NULL DEFAULT now());
INSERT INTO orders (id, amount, note) SELECT n, n * 1.5, 'note ' || n FROM generate_series(1, 100) AS n;
"""


def incremental(table: str = "orders", **options: object) -> StreamPlan:
    return replace(plan_of(table), mode="incremental", **({"disposition": "merge"} | options))  # type: ignore[arg-type]


class Runs:
    """Runs of one stream, one after the other."""

    def __init__(self, source: Server, destination: Server, plan: StreamPlan) -> None:
        self.source, self.destination, self.plan = source, destination, plan
        self.number = 0
        self.log: list[str] = []

    async def __call__(self, *, deletes: bool = False, verify: bool = False) -> Written:
        self.number += 1
        context = replace(
            context_of(f"run-{self.number}", self.number, verify=verify),
            log=lambda level, message: self.log.append(message),
        )
        return await move_changes(self.source, self.destination, self.plan, context, deletes=deletes, log=self.log)

    async def equal(self, table: str = "orders", columns: str = "*") -> bool:
        return await self.source.rows(table, columns) == await self.destination.rows(table, columns)


@pytest.mark.parametrize("cursor", [None, "at", "id"])
async def test_a_run_moves_what_was_inserted_and_updated(
    source: Server, destination: Server, cursor: str | None
) -> None:
    await source.execute(ORDERS)
    run = Runs(source, destination, incremental(cursor=cursor))
    first = await run()
    assert (first.rows, first.inserted, first.updated) == (100, 100, 0)
    assert await run.equal()

    await source.execute(
        "UPDATE orders SET amount = 0, at = now() WHERE id = 100; INSERT INTO orders (id, amount) VALUES (101, 5)"
    )
    second = await run()
    assert (second.inserted, second.updated) == (1, 1)
    assert await run.equal()

    third = await run()
    assert (third.inserted, third.updated) == (0, 0)


async def test_by_transaction_no_row_of_a_long_transaction_is_missed(source: Server, destination: Server) -> None:
    await source.execute(ORDERS)
    run = Runs(source, destination, incremental())
    await run()
    async with Server.connected(source.dsn) as other:
        transaction = other.connection.transaction()
        await transaction.start()
        await other.execute("SAVEPOINT a; INSERT INTO orders (id, amount) VALUES (500, 1)")
        await source.execute("INSERT INTO orders (id, amount) VALUES (501, 1)")
        assert (await run()).inserted == 1
        await other.execute("RELEASE SAVEPOINT a")
        await transaction.commit()
    assert (await run()).inserted == 1
    assert await run.equal()


async def test_by_cursor_a_row_that_is_committed_late_is_not_missed(source: Server, destination: Server) -> None:
    await source.execute(ORDERS)
    run = Runs(source, destination, incremental(cursor="at"))
    async with Server.connected(source.dsn) as other:
        transaction = other.connection.transaction()
        await transaction.start()
        await other.execute("INSERT INTO orders (id, amount) VALUES (500, 1)")
        await asyncio.to_thread(lambda: None)
        await source.execute("INSERT INTO orders (id, amount, at) VALUES (501, 1, clock_timestamp())")
        await run()
        await transaction.commit()
    await run()
    assert await run.equal()


async def test_rows_with_equal_cursors_are_not_lost(source: Server, destination: Server) -> None:
    await source.execute("CREATE TABLE t (id integer PRIMARY KEY, seq integer); INSERT INTO t VALUES (1, 7), (2, 7)")
    run = Runs(source, destination, incremental("t", cursor="seq"))
    await run()
    await source.execute("INSERT INTO t VALUES (3, 7)")
    await run()
    assert await run.equal("t")


@pytest.mark.parametrize(("nulls", "expected"), [("never", [1, 3]), ("first", [1, 2, 3]), ("always", [1, 2, 3, 4])])
async def test_rows_without_a_cursor_value_are_read_as_chosen(
    source: Server, destination: Server, nulls: str, expected: list[int]
) -> None:
    await source.execute("CREATE TABLE t (id integer PRIMARY KEY, seq integer); INSERT INTO t VALUES (1, 1), (2, NULL)")
    run = Runs(source, destination, incremental("t", cursor="seq", nulls=nulls))
    await run()
    await source.execute("INSERT INTO t VALUES (3, 2), (4, NULL)")
    await run()
    assert await destination.value("SELECT array_agg(id ORDER BY id) FROM t") == expected


async def test_times_are_compared_in_one_zone(source: Server, destination: Server) -> None:
    database = source.config["database"]
    await source.execute(f"ALTER DATABASE {database} SET timezone = 'Asia/Tokyo'")
    await source.execute("CREATE TABLE t (id integer PRIMARY KEY, at timestamp, seen timestamptz)")
    await source.execute("INSERT INTO t VALUES (1, '2024-03-31 02:30:00', '2024-03-31 02:30:00+09')")
    for cursor in ("at", "seen"):
        run = Runs(source, destination, replace(incremental("t", cursor=cursor), key=("id",)))
        await run()
        await source.execute(
            "INSERT INTO t SELECT max(id) + 1, max(at) + interval '1 us', max(seen) + interval '1 us' FROM t"
        )
        written = await run()
        assert written.inserted == 1
        assert await run.equal("t")
        await destination.execute("DROP TABLE t; DELETE FROM _datasync._datasync_streams")
        run.number += 10
        await destination.execute("DELETE FROM _datasync._datasync_state")


@pytest.mark.parametrize("deletes", ["hard", "soft"])
async def test_rows_that_the_source_deleted_are_found_by_their_keys(
    source: Server, destination: Server, deletes: str
) -> None:
    await source.execute(ORDERS)
    run = Runs(source, destination, incremental(deletes=deletes))
    await run(deletes=True)
    await source.execute("DELETE FROM orders WHERE id <= 10; UPDATE orders SET id = 1000 WHERE id = 50")
    written = await run(deletes=True, verify=deletes == "hard")
    assert (written.inserted, written.deleted) == (1, 11)
    if deletes == "hard":
        assert written.verified is True
        assert await run.equal()
        return
    assert await destination.value("SELECT count(*) FROM orders WHERE _datasync_deleted_at IS NULL") == 90
    await source.execute("INSERT INTO orders (id, amount) VALUES (1, 1)")
    assert (await run(deletes=True)).updated == 1
    assert await destination.value("SELECT _datasync_deleted_at IS NULL FROM orders WHERE id = 1")


async def test_appended_rows_are_appended_once(source: Server, destination: Server) -> None:
    await source.execute(ORDERS)
    for cursor in (None, "at", "id"):
        run = Runs(source, destination, incremental(cursor=cursor, disposition="append"))
        run.number = 100 * (1 + [None, "at", "id"].index(cursor))
        await destination.execute("DROP TABLE IF EXISTS orders")
        if await destination.value("SELECT to_regclass('_datasync._datasync_streams') IS NOT NULL"):
            await destination.execute("DELETE FROM _datasync._datasync_streams")
        await run()
        await source.execute("INSERT INTO orders (id, amount) SELECT max(id) + 1, 1 FROM orders")
        assert (await run()).inserted == 1
        assert (await run()).inserted == 0
        assert await run.equal()


async def test_a_full_refresh_may_append(source: Server, destination: Server) -> None:
    await source.execute(ORDERS)
    run = Runs(source, destination, replace(plan_of("orders"), disposition="append"))
    await run()
    assert (await run()).inserted == 100
    assert await destination.value("SELECT count(*) FROM orders") == 200


async def test_new_and_widened_columns_are_taken_over(source: Server, destination: Server) -> None:
    await source.execute(ORDERS)
    run = Runs(source, destination, incremental())
    await run()
    await source.execute(
        "ALTER TABLE orders ADD COLUMN extra text DEFAULT 'x', ALTER COLUMN id TYPE bigint, DROP COLUMN note"
    )
    written = await run()
    assert await run.equal(columns="id, amount, at, extra")
    assert written.rows == 100
    assert await destination.value("SELECT count(*) FROM orders WHERE note IS NOT NULL") == 100
    await source.execute("INSERT INTO orders (id, amount) VALUES (9999999999, 1)")
    await run()
    assert await run.equal(columns="id, amount, at, extra")


@pytest.mark.parametrize(
    ("policy", "change", "message"),
    [
        ("evolve", "ALTER COLUMN amount TYPE integer", "column amount changes from numeric to integer"),
        ("freeze", "ADD COLUMN extra text", "column extra"),
        ("freeze", "DROP COLUMN note", "column note"),
        ("ignore", "ALTER COLUMN id TYPE bigint", "column id changes from integer to bigint"),
    ],
)
async def test_a_change_that_the_policy_does_not_allow_is_refused_by_name(
    source: Server, destination: Server, policy: str, change: str, message: str
) -> None:
    await source.execute(ORDERS)
    run = Runs(source, destination, incremental(schema_policy=policy))
    await run()
    await source.execute(f"ALTER TABLE orders {change}")
    with pytest.raises(ConnectorRefused, match=message) as refused:
        await run()
    assert refused.value.code == "schema_changed"


async def test_under_ignore_only_known_columns_move(source: Server, destination: Server) -> None:
    await source.execute(ORDERS)
    run = Runs(source, destination, incremental(schema_policy="ignore"))
    await run()
    await source.execute("ALTER TABLE orders ADD COLUMN extra text; INSERT INTO orders (id, extra) VALUES (101, 'x')")
    await run()
    assert await run.equal(columns="id, amount, note, at")
    assert (
        await destination.value(
            "SELECT count(*) FROM information_schema.columns WHERE table_name = 'orders' AND column_name = 'extra'"
        )
        == 0
    )


async def test_partitions_are_read_whole_when_they_are_attached(source: Server, destination: Server) -> None:
    await source.execute(
        """
        CREATE TABLE t (id integer, part integer, PRIMARY KEY (id, part)) PARTITION BY LIST (part);
        CREATE TABLE t1 PARTITION OF t FOR VALUES IN (1);
        CREATE TABLE t2 (id integer, part integer, PRIMARY KEY (id, part));
        INSERT INTO t2 SELECT n, 2 FROM generate_series(1, 10) AS n;
        ALTER TABLE t2 ALTER id SET NOT NULL, ALTER part SET NOT NULL;
        INSERT INTO t VALUES (1, 1);
        """
    )
    run = Runs(source, destination, incremental("t"))
    await run()
    await source.execute("ALTER TABLE t ATTACH PARTITION t2 FOR VALUES IN (2)")
    assert (await run()).inserted == 10
    assert await run.equal("t")


async def test_columns_are_renamed_and_rows_filtered(source: Server, destination: Server) -> None:
    await source.execute(ORDERS)
    plan = incremental(renames={"id": "order id", "amount": "sum"}, row_filter=parse_filter('id > 90 and note != "x"'))
    run = Runs(source, destination, replace(plan, deletes="hard"))
    await run(deletes=True)
    await source.execute("UPDATE orders SET amount = 1 WHERE id IN (1, 95); DELETE FROM orders WHERE id = 91")
    written = await run(deletes=True, verify=True)
    assert (written.updated, written.deleted, written.verified) == (1, 1, True)
    there = await destination.value('SELECT array_agg("order id" ORDER BY "order id") FROM orders')
    assert there == list(range(92, 101))
    assert await destination.value('SELECT sum FROM orders WHERE "order id" = 95') == 1


async def test_a_table_without_a_key_is_refused_unless_one_is_named(source: Server, destination: Server) -> None:
    await source.execute("CREATE TABLE t (id integer, note text); INSERT INTO t VALUES (1, 'a')")
    with pytest.raises(ConnectorRefused) as refused:
        await Runs(source, destination, incremental("t"))()
    assert refused.value.code == "key_needed"
    run = Runs(source, destination, incremental("t", key=("id",)))
    await run()
    await source.execute("UPDATE t SET note = 'b'")
    await run()
    assert await run.equal("t")


async def test_a_view_needs_a_cursor(source: Server, destination: Server) -> None:
    await source.execute(ORDERS + "CREATE VIEW v AS SELECT * FROM orders")
    with pytest.raises(ConnectorRefused) as refused:
        await Runs(source, destination, incremental("v", key=("id",)))()
    assert refused.value.code == "cursor_needed"
    run = Runs(source, destination, incremental("v", key=("id",), cursor="at"))
    await run()
    assert await destination.value("SELECT count(*) FROM v") == 100


async def test_bytes_are_compared_not_values(source: Server, destination: Server) -> None:
    await source.execute("CREATE TABLE t (id integer PRIMARY KEY, n numeric, doc json)")
    await source.execute("INSERT INTO t VALUES (1, 1.0, '{}')")
    run = Runs(source, destination, incremental("t"))
    await run()
    await source.execute("UPDATE t SET n = 1.00, doc = '{ }'")
    assert (await run()).updated == 1
    assert await run.equal("t")
