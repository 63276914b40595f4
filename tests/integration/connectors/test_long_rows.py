"""Memory stays bounded by the largest row, whatever a row's size."""

import asyncio
import json
import sys

import pytest

from tests.integration.connectors.moving import Lake, Server

MEBIBYTE = 1024 * 1024
ROWS = 5


@pytest.mark.parametrize("mebibytes", [32, 96])
@pytest.mark.parametrize("kind", ["postgres", "parquet"])
async def test_memory_is_bounded_by_the_largest_row(
    source: Server, destination: Server, lake: Lake, kind: str, mebibytes: int
) -> None:
    """At most 250 MB and six of the largest row, read by two connections at once."""
    await source.execute(
        f"""
        CREATE TABLE t (id int, page char(4000), note text); ALTER TABLE t ALTER page SET STORAGE PLAIN;
        INSERT INTO t SELECT n, 'x', repeat(chr(96 + n), {mebibytes * MEBIBYTE}) FROM generate_series(1, {ROWS}) AS n
        """
    )
    writing = destination.config if kind == "postgres" else {"local_path": str(lake.path)}
    ends = {"source": source.config, "destination": writing, "type": kind}
    moving = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.integration.connectors.moving_process", json.dumps(ends)),
        stdout=asyncio.subprocess.PIPE,
    )
    told, _ = await asyncio.wait_for(moving.communicate(), 120)
    assert moving.returncode == 0
    peak_megabytes = int(told) / 1_000_000
    assert peak_megabytes <= 250 + 6 * mebibytes * MEBIBYTE / 1_000_000
    if kind == "postgres":
        assert await destination.value("SELECT sum(length(note)) FROM t") == ROWS * mebibytes * MEBIBYTE
