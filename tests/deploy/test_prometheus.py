"""The configuration of Prometheus, the alerts and the dashboard, with a real Prometheus on a running suite."""

import asyncio
import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.testing.cluster import until
from libs.contracts.services import SERVICES
from libs.suite.child_process import die_with_parent, free_port
from libs.testing.databases import postgres_config
from libs.testing.rest import rest
from libs.testing.suite import Suite
from tests.deploy.test_alerts import ALERTS, CONFIG, RULES
from tests.e2e.replication import await_end, execute, make_endpoint, make_job

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "deploy/compose/grafana/dashboards/datasync.json").read_text())
PANELS = {target["expr"]: panel["title"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())}
# What has no samples while nothing goes wrong.
NOT_SEEN = {"Messages parked", "Requests refused by rate limits"}

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not on the PATH (Debian's package: prometheus)"
)


class Prometheus:
    """A Prometheus with the configuration of the Compose file that reads a suite's services instead of containers."""

    def __init__(self, suite: Suite, directory: Path) -> None:
        config = yaml.safe_load(CONFIG.read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(ALERTS)]
        for job in config["scrape_configs"]:
            del job["relabel_configs"]
            job["static_configs"] = [
                {"targets": [suite.url_of(name).removeprefix("http://")], "labels": {"component": name}}
                for found in job.pop("dns_sd_configs")
                for name in found["names"]
            ]
            if "authorization" in job:
                job["authorization"]["credentials"] = suite.api_key
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._directory = directory
        self._address = f"127.0.0.1:{free_port()}"

    def __enter__(self) -> "Prometheus":
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={self._directory}/prometheus.yml",
                    f"--storage.tsdb.path={self._directory}/data",
                    f"--web.listen-address={self._address}",
                ],
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)

    def get(self, path: str, **query: str) -> Any:
        """The ``data`` of an answer of its API; None while it does not answer."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(
                f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=10
            ) as sent:
                answer = json.load(sent)
        except OSError:
            return None
        assert answer["status"] == "success", answer
        return answer["data"]

    def samples(self, query: str) -> list[Any]:
        found: list[Any] = (self.get("query", query=query) or {}).get("result", [])
        return found


@pytest.fixture(scope="module")
def suite() -> Iterator[Suite]:
    with Suite() as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has read every service."""
    with Prometheus(suite, tmp_path_factory.mktemp("prometheus")) as running:
        until(lambda: len(running.samples("up == 1")) == len(SERVICES), "every service is read", 60)
        yield running


async def test_every_panel_shows_what_happens(
    suite: Suite, prometheus: Prometheus, postgres_database: str, tmp_path: Path
) -> None:
    await execute(postgres_database, "CREATE TABLE t AS SELECT 1 AS id")
    async with rest(suite.base_url, api_key=suite.api_key) as api:
        source = await make_endpoint(api, "sources", "postgres", postgres_config(postgres_database))
        destination = await make_endpoint(api, "destinations", "parquet", {"local_path": str(tmp_path)})
        job = await make_job(api, source, destination)
        await api.project("POST", f"jobs/{job}/sync")
        assert (await await_end(api, job))["status"] == "completed"

    def shown() -> set[str]:
        return {title for query, title in PANELS.items() if prometheus.samples(query)}

    await asyncio.to_thread(until, lambda: shown() >= set(PANELS.values()) - NOT_SEEN, "the panels have data", 60)


def test_every_metric_that_is_named_is_exported(prometheus: Prometheus) -> None:
    exported = set(prometheus.get("metadata"))
    queries = [*PANELS, *(rule["expr"] for rule in RULES)]
    for name in re.findall(r"\bdatasync_[a-z_]+", " ".join(queries)):
        assert {name, re.sub("_(bucket|count|sum)$", "", name)} & exported, name


def test_every_alert_is_evaluated_and_none_fires_on_a_sound_suite(prometheus: Prometheus) -> None:
    def rules() -> list[dict[str, Any]]:
        return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]

    until(lambda: all(rule["health"] != "unknown" for rule in rules()), "the rules are evaluated", 60)
    assert {rule["name"]: (rule["health"], rule["state"]) for rule in rules()} == {
        rule["alert"]: ("ok", "inactive") for rule in RULES
    }
