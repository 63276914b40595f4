"""The commands of the README and of the pages in ``docs/`` work as printed, on a suite that holds other entities."""

import asyncio
import json
import re
import subprocess
from pathlib import Path

import pytest

from libs.testing.databases import postgres_config
from libs.testing.suite import Suite
from tests.e2e.replication import execute, unique

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 60
ROWS = 26_115


async def test_the_walk_of_the_readme_copies_its_tables(suite: Suite, postgres_database: str) -> None:
    await execute(
        postgres_database,
        "CREATE TABLE airlines (carrier text PRIMARY KEY);"
        f"CREATE TABLE weather AS SELECT n AS id FROM generate_series(1, {ROWS}) AS n",
    )
    script = commands("README.md", DATASYNC=suite.base_url, NAME=unique("ann"))
    done = await asyncio.to_thread(shell, script, CONFIG=json.dumps(postgres_config(postgres_database)))
    assert (done.returncode, done.stderr) == (0, "")
    assert '"verified":true' in done.stdout
    assert done.stdout.splitlines()[-1] == f"{ROWS} rows"


@pytest.mark.parametrize("page", ["docs/api.md", "docs/records.md"])
async def test_the_commands_of_a_page_succeed(embedded_suite: Suite, page: str) -> None:
    script = commands(page, DATASYNC=embedded_suite.base_url, API_KEY=embedded_suite.api_key)
    done = await asyncio.to_thread(shell, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def commands(page: str, **values: str) -> str:
    """The ``sh`` blocks of a page as one script, with other values of these variables."""
    script = "".join(re.findall(r"^```sh\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE))
    for name, value in values.items():
        script, count = re.subn(rf"^{name}=[^#\n]*", f"{name}={value} ", script, flags=re.MULTILINE)
        assert count == 1, f"{page} sets {name} {count} times"
    return script


def shell(script: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "NO_PROXY": "*", **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
