"""How the tests move tables: a server or a directory with its connector, and one run from a source to it."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pyarrow as pa
import pyarrow.parquet as pq

from libs.connectors import registry
from libs.connectors.protocol import Destination, Policy, RunContext, StreamName, StreamPlan, Target, Written
from libs.connectors.states import StreamState

# Every type that has to arrive without loss, with the values that are easily lost.
EVERY_TYPE = """
CREATE TYPE mood AS ENUM ('sad', 'so "so"', 'it''s fine', '');
CREATE DOMAIN positive AS integer CHECK (VALUE > 0);
CREATE DOMAIN amount AS numeric(20,4);
CREATE TABLE everything (
    id integer PRIMARY KEY, small smallint, big bigint, real4 real, real8 double precision,
    exact numeric(12,2), wide numeric(50,10), whole numeric(5,-2), tiny numeric(3,5), free numeric,
    flag boolean, note text, short varchar(10), padded char(6), ident name, raw bytea,
    day date, at timestamp, seen timestamptz, clock time, zoned timetz, lasted interval,
    key uuid, doc json, bin jsonb, feeling mood, count positive, paid amount,
    numbers integer[], words text[], prices numeric(8,2)[], grid integer[][], moods mood[], counts positive[],
    days date[], keys uuid[], blobs bytea[], spans interval[], address inet, period int4range, "Odd ""name" text
);
INSERT INTO everything VALUES (
    1, -32768, 9223372036854775807, 1.1, 0.1, 1234567890.12, 1234567890123456789012345678901234567890.0123456789, 12300,
    0.00123, 3.14159265358979323846264338327950288419716939937510, true,
    E'tab\\t, newline\\n, quote "'' and \\\\ ünï ☃',
    'abc', 'ab', 'ident', '\\x00ff0a5c', '2024-02-29', '2024-02-29 23:59:59.999999', '2024-03-31 01:30:00.123456+02',
    '23:59:59.999999', '12:34:56.789+05:30', '1 year -2 months 3 days -04:05:06.789',
    'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', '{"b":1,  "a": [1.10, null]}', '{"b": 1.10, "a": "☃"}', 'so "so"', 7,
    1234567890123456.7891, '{1,NULL,3}', '{"a","",NULL,"NULL","with \\"quotes\\""}', '{1.10,NULL,99999.99}', '{1,2}',
    '{sad,NULL,"so \\"so\\""}', '{1,2}', '{2024-01-01,NULL}', '{a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11}', '{"\\\\x00ff"}',
    '{"1 day","-01:00"}', '10.0.0.1/8', '[1,5)', 'x'
);
INSERT INTO everything (id) VALUES (2);
INSERT INTO everything
    (id, real4, real8, free, note, short, padded, raw, day, at, seen, exact, lasted, feeling, numbers)
VALUES (3, 'NaN', '-Infinity', 0, '', '', '', '', '0001-01-01 BC', '4713-01-01 00:00 BC',
    '99999-12-31 23:59:59.999999+00',
    -0.01, '0', '', '{}'),
    (4, '-0', '1e-300', 1e100, repeat('x', 100000), NULL, NULL, repeat('y', 100000)::bytea, '5874897-12-31',
    '290000-01-01', '1000-01-01 00:00+00', 0, '178000000 years', 'sad', NULL);
"""
# What PostgreSQL and no Parquet file holds.
BEYOND_PARQUET = """
INSERT INTO everything (id, exact, day, at, seen, clock, numbers, days, free) VALUES
    (5, 'NaN', 'infinity', '-infinity', 'infinity', '24:00', '{{1,2},{3,4}}', '{infinity}', 'NaN'),
    (6, 'NaN', '-infinity', 'infinity', '-infinity', '24:00', '[2:3]={1,2}', '{-infinity}', 'Infinity');
"""


def config_of(dsn: str) -> dict[str, Any]:
    address = urlsplit(dsn)
    return {
        "host": address.hostname,
        "port": address.port,
        "database": address.path.removeprefix("/"),
        "username": address.username,
        "password": address.password,
        "ssl": {"mode": "disable"},
        "retry_count": 0,
    }


@dataclass
class Server:
    """A database with a connection that looks at it."""

    config: dict[str, Any]
    connection: "asyncpg.Connection[Any]"
    dsn: str
    overrides: dict[str, Any] = field(default_factory=dict)

    @classmethod
    @asynccontextmanager
    async def connected(cls, dsn: str) -> AsyncIterator["Server"]:
        connection = await asyncpg.connect(dsn, server_settings={"timezone": "UTC", "intervalstyle": "iso_8601"})
        try:
            yield cls(config_of(dsn), connection, dsn)
        finally:
            await connection.close()

    def destination(self) -> Destination:
        return registry.open_destination("postgres", self.config | self.overrides)

    async def execute(self, sql: str) -> None:
        await self.connection.execute(sql)

    async def value(self, sql: str, *arguments: Any) -> Any:
        return await self.connection.fetchval(sql, *arguments)

    @asynccontextmanager
    async def limited_role(self) -> AsyncIterator[dict[str, Any]]:
        """A role without any right; yields what a configuration says of it."""
        role = f"limited_{self.config['database']}"
        await self.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'limited'")
        try:
            yield {"username": role, "password": "limited"}
        finally:
            await self.execute(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")

    async def rows(self, table: str, columns: str = "*") -> list[str]:
        """Every row as the server prints it, ordered."""
        found = await self.connection.fetch(
            f"SELECT r::text AS row FROM (SELECT {columns} FROM {table}) AS r ORDER BY r::text"
        )
        return [row["row"] for row in found]

    async def tables(self) -> list[str]:
        found = await self.connection.fetch(
            "SELECT schemaname || '.' || tablename AS name FROM pg_tables "
            "WHERE schemaname NOT IN ('pg_catalog', 'information_schema') ORDER BY 1"
        )
        return [row["name"] for row in found if not row["name"].startswith("_datasync.")]


@dataclass
class Lake:
    """A directory of Parquet files."""

    path: Path

    def destination(self) -> Destination:
        return registry.open_destination("parquet", {"local_path": str(self.path)})

    def files(self, table: str = "public/everything") -> list[Path]:
        """What a plain reader of one table's folder sees."""
        return sorted(self.path.glob(f"{table}/*.parquet"))

    def rows(self, table: str = "public/everything") -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for file in self.files(table):
            with pq.ParquetFile(file) as opened:
                columns = opened.read()
            values = [[_python(item) for item in column] for column in columns.columns]
            found += [dict(zip(columns.column_names, row, strict=True)) for row in zip(*values, strict=True)]
        return found


def _python(value: "pa.Scalar[Any]") -> Any:
    """Days and microseconds since 1970 where Python has no such date."""
    try:
        return value.as_py()
    except OverflowError:
        return value.cast(pa.int32() if pa.types.is_date32(value.type) else pa.int64()).as_py()


class Counts:
    """Progress that is added up."""

    def __init__(self) -> None:
        self.rows_read = self.rows_written = self.bytes_read = 0

    def add(self, *, rows_read: int = 0, rows_written: int = 0, bytes_read: int = 0, bytes_written: int = 0) -> None:
        self.rows_read += rows_read
        self.rows_written += rows_written
        self.bytes_read += bytes_read

    def loaded(self) -> None:
        """Nothing is added up for it."""


def plan_of(
    table: str = "everything", columns: Sequence[str] | None = None, policies: Mapping[str, Policy] | None = None
) -> StreamPlan:
    chosen = None if columns is None else tuple(columns)
    return StreamPlan(
        StreamName("public", table), Target("public", table), chosen, policies=dict(policies) if policies else {}
    )


def plan_from(options: Mapping[str, Any]) -> StreamPlan:
    """A plan of the table ``t``."""
    return replace(plan_of("t"), **options)


def context_of(
    run_id: str = "run-1",
    epoch: int = 1,
    *,
    job_id: int = 1,
    project_id: int = 1,
    verify: bool = True,
    living_jobs: frozenset[int] | None = None,
) -> RunContext:
    return RunContext(
        job_id=job_id, project_id=project_id, run_id=run_id, epoch=epoch, verify=verify, living_jobs=living_jobs
    )


async def move(
    source: Server,
    destination: Server | Lake,
    plan: StreamPlan | None = None,
    context: RunContext | None = None,
    progress: Counts | None = None,
) -> Written:
    """One run of one stream."""
    plan = plan or plan_of()
    reading = registry.open_source("postgres", source.config | source.overrides)
    async with reading.snapshot() as snapshot, destination.destination().open(context or context_of()) as run:
        table = await snapshot.table(plan)
        await run.prepare(table)
        return await run.write(table, progress or Counts())


async def move_changes(
    source: Server,
    destination: Server | Lake,
    plan: StreamPlan,
    context: RunContext,
    *,
    deletes: bool = False,
    log: list[str] | None = None,
) -> Written:
    """One run of one stream, from the state that the last one recorded.

    Args:
        deletes: also delete the rows that the source no longer has.
        log: takes the warnings.
    """
    reading = registry.open_source("postgres", source.config | source.overrides)
    async with reading.snapshot() as snapshot, destination.destination().open(context) as run:
        state = await run.state(plan)
        table = await snapshot.table(plan, None if state is None else state.position)
        if log is not None:
            log += table.warnings
        prepared = await run.prepare(table)
        table = table.without(prepared.left_out)
        position = None if table.state is None else StreamState(mode=plan.mode, position=table.state)
        return await run.write(table, Counts(), state=position, keys=table.keys() if deletes else None)
