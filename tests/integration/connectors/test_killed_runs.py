"""Incremental runs that are killed at every step: the next attempt finishes them, and no row is lost or doubled."""

import asyncio
import json
import sys
from typing import Any

import pytest

from libs.testing.walks import Walk
from tests.integration.connectors.killed_runs import KILLED
from tests.integration.connectors.moving import Lake, Server, context_of, move_changes, plan_from

TABLE = """
CREATE TABLE t (id integer PRIMARY KEY, note text);
INSERT INTO t SELECT n, md5(n::text) FROM generate_series(1, 300) AS n;
"""
CHANGES = """
UPDATE t SET note = 'changed {run}' WHERE id % 10 = 0; DELETE FROM t WHERE id % 17 = 0;
INSERT INTO t SELECT max(id) + 1, 'new {run}' FROM t;
"""
PLANS: dict[str, dict[str, Any]] = {
    "replace": {},
    "merge": {"mode": "incremental", "disposition": "merge", "deletes": "hard"},
    "append": {"mode": "incremental", "disposition": "append"},
}


async def killed_at(step: int, source: Server, to: Server | Lake, plan: str, run: int, epoch: int) -> bool:
    """Run the stream in a process that is killed at a step; returns whether it got that far."""
    given = {
        "step": step,
        "source": source.dsn,
        "kind": "postgres" if isinstance(to, Server) else "parquet",
        "destination": to.dsn if isinstance(to, Server) else str(to.path),
        "plan": PLANS[plan],
        "run_id": f"run-{run}",
        "epoch": epoch,
        "deletes": plan == "merge",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.integration.connectors.killed_runs", json.dumps(given)
    )
    code = await process.wait()
    assert code in (0, KILLED)
    return code == KILLED


async def rows_of(to: Server | Lake) -> list[tuple[int, str]]:
    if isinstance(to, Server):
        return [tuple(row) for row in await to.connection.fetch("SELECT id, note FROM t ORDER BY id, note")]
    return sorted((row["id"], row["note"]) for row in to.rows("public/t"))


@pytest.mark.parametrize("kind", ["postgres", "parquet"])
@pytest.mark.parametrize("plan", PLANS)
async def test_a_killed_run_is_finished_by_its_next_attempt(
    source: Server, destination: Server, lake: Lake, kind: str, plan: str, walk: Walk
) -> None:
    to: Server | Lake = destination if kind == "postgres" else lake
    await source.execute(TABLE)
    await move_changes(source, to, plan_from(PLANS[plan]), context_of("run-0", 1, verify=False))
    epoch, step, run = 1, 0, 0
    while True:
        # All steps on a long walk; a few of them otherwise.
        step += walk.rounds(walk.random.randrange(8, 30), 1)
        run += 1
        await source.execute(CHANGES.format(run=run))
        epoch += 2
        was_killed = await killed_at(step, source, to, plan, run, epoch)
        if was_killed:
            context = context_of(f"run-{run}", epoch + 1, verify=False)
            async with to.destination().open(context) as opened:
                committed = await opened.committed(plan_from(PLANS[plan]))
            if committed is None:
                context = context_of(f"run-{run}", epoch + 1, verify=False)
                await move_changes(source, to, plan_from(PLANS[plan]), context, deletes=plan == "merge")
        there = [tuple(row) for row in await source.connection.fetch("SELECT id, note FROM t ORDER BY id, note")]
        if plan == "append":
            found = await rows_of(to)
            assert len(found) == len(set(found)), f"a row was appended twice, step {step}"
            assert set(there) <= set(found), f"step {step}"
        else:
            assert await rows_of(to) == there, f"step {step}"
        if not was_killed:
            break
    if isinstance(to, Server):
        left = await to.value("SELECT count(*) FROM pg_class WHERE relname LIKE '\\_datasync\\_stage%'")
        assert left == 0
