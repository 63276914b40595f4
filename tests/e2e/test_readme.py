"""The commands of the README and of the pages in ``docs/`` work as printed, on a suite that holds other entities."""

import asyncio
import json
import subprocess

import pytest

from libs.testing.databases import postgres_config
from libs.testing.pages import adapted, blocks, follow
from libs.testing.suite import Suite
from tests.e2e.replication import execute, unique

ROWS = 26_115


async def test_the_walk_of_the_readme_copies_its_tables(suite: Suite, postgres_database: str) -> None:
    await execute(
        postgres_database,
        "CREATE TABLE airlines (carrier text PRIMARY KEY);"
        f"CREATE TABLE weather AS SELECT n AS id FROM generate_series(1, {ROWS}) AS n",
    )
    script = adapted("".join(blocks("README.md")), DATASYNC=suite.base_url, NAME=unique("ann"))
    done = await asyncio.to_thread(shell, script, CONFIG=json.dumps(postgres_config(postgres_database)))
    assert (done.returncode, done.stderr) == (0, "")
    assert '"verified":true' in done.stdout
    assert done.stdout.splitlines()[-1] == f"{ROWS} rows"


@pytest.mark.parametrize("page", ["docs/api.md", "docs/records.md"])
async def test_the_commands_of_a_page_succeed(embedded_suite: Suite, page: str) -> None:
    script = adapted("".join(blocks(page)), DATASYNC=embedded_suite.base_url, API_KEY=embedded_suite.api_key)
    done = await asyncio.to_thread(shell, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def shell(script: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return follow(script, {"PATH": "/usr/local/bin:/usr/bin:/bin", "NO_PROXY": "*", **variables})
