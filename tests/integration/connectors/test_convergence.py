"""Random changes of rows and columns between incremental runs: the destination converges to the source."""

import random
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from libs.testing.walks import Walk
from tests.integration.connectors.moving import Lake, Server, context_of, move_changes, plan_of

TYPES = {"integer": "bigint", "smallint": "integer", "numeric(8,2)": "numeric(12,4)", "text": "text", "date": "date"}
VALUES = {
    "integer": "(random() * 1000)::int",
    "smallint": "(random() * 100)::int",
    "bigint": "(random() * 1e12)::bigint",
    "numeric(8,2)": "round((random() * 1000)::numeric, 2)",
    "numeric(12,4)": "round((random() * 1000)::numeric, 4)",
    "text": "md5(random()::text)",
    "date": "'2024-01-01'::date + (random() * 100)::int",
}


class Changes:
    """Random statements on the table ``t`` of a source."""

    def __init__(self, source: Server, choices: random.Random) -> None:
        self.source = source
        self.random = choices
        self.columns: dict[str, str] = {"v": "integer", "w": "text"}
        self.next_column = 0

    async def start(self) -> None:
        await self.source.execute("CREATE TABLE t (id bigint PRIMARY KEY, v integer, w text)")
        await self.source.execute("INSERT INTO t SELECT n, n, md5(n::text) FROM generate_series(1, 200) AS n")

    async def step(self) -> None:
        steps: list[Callable[[], Awaitable[None]]] = [
            *[self.insert] * 3,
            *[self.update] * 3,
            *[self.delete] * 2,
            self.move_key,
            self.add_column,
            self.widen,
            self.drop_column,
            self.rewrite,
        ]
        for _ in range(self.random.randint(1, 4)):
            await self.random.choice(steps)()

    def some(self) -> str:
        low = self.random.randint(1, 400)
        return f"id BETWEEN {low} AND {low + self.random.randint(0, 40)}"

    async def insert(self) -> None:
        low = self.random.randint(1, 400)
        names = ", ".join(f'"{name}"' for name in self.columns)
        values = ", ".join(VALUES[kind] for kind in self.columns.values())
        await self.source.execute(
            f"INSERT INTO t (id, {names}) SELECT n, {values} FROM generate_series({low}, {low + 20}) AS n "
            "ON CONFLICT DO NOTHING"
        )

    async def update(self) -> None:
        name = self.random.choice(list(self.columns))
        value = self.random.choice([VALUES[self.columns[name]], "NULL"])
        await self.source.execute(f'UPDATE t SET "{name}" = {value} WHERE {self.some()}')

    async def delete(self) -> None:
        await self.source.execute(f"DELETE FROM t WHERE {self.some()}")

    async def move_key(self) -> None:
        await self.source.execute(
            f"UPDATE t SET id = id + 10000 WHERE {self.some()} AND NOT EXISTS "
            "(SELECT FROM t AS o WHERE o.id = t.id + 10000)"
        )

    async def add_column(self) -> None:
        kind = self.random.choice(list(TYPES))
        name = f"c{self.next_column}"
        self.next_column += 1
        default = self.random.choice(["", f" DEFAULT {VALUES[kind]}"])
        await self.source.execute(f"ALTER TABLE t ADD COLUMN {name} {kind}{default}")
        self.columns[name] = kind

    async def widen(self) -> None:
        name = self.random.choice(list(self.columns))
        wider = TYPES.get(self.columns[name], self.columns[name])
        await self.source.execute(f'ALTER TABLE t ALTER COLUMN "{name}" TYPE {wider}')
        self.columns[name] = wider

    async def drop_column(self) -> None:
        if len(self.columns) > self.random.randint(2, 6):
            name = self.random.choice(list(self.columns))
            await self.source.execute(f'ALTER TABLE t DROP COLUMN "{name}"')
            del self.columns[name]

    async def rewrite(self) -> None:
        await self.source.execute(self.random.choice(["VACUUM FULL t", "VACUUM FREEZE t", "TRUNCATE t"]))


@pytest.mark.parametrize("kind", ["postgres", "parquet"])
async def test_incremental_runs_converge(
    source: Server, destination: Server, lake: Lake, kind: str, walk: Walk
) -> None:
    changes = Changes(source, walk.random)
    await changes.start()
    plan = replace(plan_of("t"), mode="incremental", disposition="merge", deletes="hard")
    to: Server | Lake = destination if kind == "postgres" else lake
    for number in range(1, walk.rounds(8, 400) + 1):
        context = context_of(f"run-{number}", number, verify=number % 3 == 0)
        written = await move_changes(source, to, plan, context, deletes=True)
        assert written.verified in (None, True)
        names = ["id", *changes.columns]
        selected = ", ".join(f'"{name}"' for name in names)
        expected = [tuple(row) for row in await source.connection.fetch(f"SELECT {selected} FROM t ORDER BY id")]
        if isinstance(to, Server):
            found = [tuple(row) for row in await to.connection.fetch(f"SELECT {selected} FROM t ORDER BY id")]
        else:
            rows = sorted(to.rows("public/t"), key=lambda row: row["id"])
            found = [tuple(row[name] for name in names) for row in rows]
        assert found == expected, f"round {number}"
        await changes.step()
