"""The README's walk works as it is printed."""

import asyncio
import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from libs.testing.suite import Suite
from tests.e2e.replication import execute, postgres_config, unique

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 60
ROWS = 26_115


async def test_the_walk_copies_its_tables_on_a_suite_that_others_use(suite: Suite, postgres_database: str) -> None:
    await execute(
        postgres_database,
        "CREATE TABLE airlines (carrier text PRIMARY KEY);"
        f"CREATE TABLE weather AS SELECT n AS id FROM generate_series(1, {ROWS}) AS n",
    )
    script = walk({"DATASYNC": suite.base_url, "NAME": unique("ann")})
    done = await asyncio.to_thread(shell, script, CONFIG=json.dumps(postgres_config(postgres_database)))
    assert (done.returncode, done.stderr) == (0, "")
    assert '"verified":true' in done.stdout
    assert done.stdout.splitlines()[-1] == f"{ROWS} rows"


def walk(values: Mapping[str, str]) -> str:
    """The commands of the README's ``sh`` block, with other values of these variables."""
    script: str
    [script] = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    for name, value in values.items():
        script, count = re.subn(rf"^{name}=\S+", f"{name}={value}", script, flags=re.MULTILINE)
        assert count == 1, f"the README's walk sets {name} {count} times"
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
