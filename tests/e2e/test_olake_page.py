"""What the present web page of OLake UI sends, call by call, and the fields that it reads without a guard."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from libs.testing.databases import postgres_config
from libs.testing.rest import Rest, rest
from libs.testing.suite import Suite
from tests.e2e.replication import await_end, execute, unique

EMPTY_STORE = dict.fromkeys(("s3_bucket", "s3_region", "s3_path", "s3_endpoint"), "")
TABLES = """
    CREATE TABLE orders (id bigint PRIMARY KEY, note text);
    INSERT INTO orders SELECT n, repeat('x', 200) FROM generate_series(1, 500) n;
    CREATE TABLE customers (id bigint PRIMARY KEY);
"""


@pytest.fixture
async def page(embedded_suite: Suite) -> AsyncIterator[Rest]:
    """A session of a user with a short password; like the page, it also sends a bearer that is no credential."""
    async with rest(embedded_suite.base_url, api_key="authenticated") as client:
        await client.sign_up_and_log_in(unique("admin").replace("-", "_"), "password")
        client.project_id = (await client.call("GET", "/api/v1/projects"))[0]["id"]
        yield client


class Wizard:
    """Goes through the page's dialogues.

    Args:
        page: its session.
        lake: the directory of the destination.
    """

    def __init__(self, page: Rest, dsn: str, lake: Path) -> None:
        self.page = page
        self.configs: dict[str, Any] = {
            "sources": {**postgres_config(dsn), "jdbc_url_params": {}, "ssh_config": {"type": "no_tunnel"}},
            "destinations": {"type": "PARQUET", "writer": {"local_path": str(lake), **EMPTY_STORE}},
        }

    async def create_endpoint(self, family: str, kind: str) -> dict[str, Any]:
        """Fill in the form, test it, create it; returns it as the list shows it."""
        role, name = family.removesuffix("s"), unique(kind)
        version = (await self.page.project("GET", f"{family}/versions", type=kind))["version"][0]
        beside = {} if role == "source" else {"source_type": "", "source_version": ""}
        spec = (await self.page.project("POST", f"{family}/spec", {"type": kind, "version": version, **beside}))["spec"]
        assert spec["jsonschema"]["properties"]
        json.loads(spec["uischema"])
        assert (await self.page.project("POST", "check-unique", {"name": name, "entity_type": role}))["unique"] is True
        sent = {"type": kind, "version": version, "config": json.dumps(self.configs[family])}
        tested = await self.page.project("POST", f"{family}/test", {**sent, **beside})
        assert tested["connection_result"]["status"] == "SUCCEEDED", tested
        assert {"level", "time", "message"} <= tested["logs"][0].keys()
        await self.page.project("POST", family, {"name": name, **sent})
        taken = await self.page.answer(
            "POST",
            f"/api/v1/project/{self.page.project_id}/check-unique",
            {"name": name, "entity_type": role},
        )
        assert taken.status == 409
        [shown] = [item for item in await self.page.project("GET", family) if item["name"] == name]
        assert shown.keys() >= {"id", "type", "version", "created_at", "updated_at", "created_by", "updated_by", "jobs"}
        assert json.loads(shown["config"]).keys() == self.configs[family].keys()
        return shown  # type: ignore[no-any-return]

    async def create_job(self, source: dict[str, Any], destination: dict[str, Any]) -> dict[str, Any]:
        """Choose all streams of the source; returns the job as the list shows it."""
        asked = {name: source[name] for name in ("name", "type", "version", "config")}
        catalog = await self.page.project(
            "POST", "sources/streams", {**asked, "job_name": "", "job_id": -1, "max_discover_threads": 50}
        )
        del catalog["streams_config"]
        for selections in catalog["selected_streams"].values():
            for selection in selections:
                selection["disabled"] = False
        body = self.job_body(unique("job"), source, destination, catalog)
        assert (await self.page.project("POST", "check-unique", {"name": body["name"], "entity_type": "job"}))["unique"]
        echoed = await self.page.project("POST", "jobs", body)
        assert {name: echoed[name] for name in ("name", "frequency", "streams_config")} == {
            name: body[name] for name in ("name", "frequency", "streams_config")
        }
        [shown] = [job for job in await self.page.project("GET", "jobs") if job["name"] == body["name"]]
        return shown  # type: ignore[no-any-return]

    @staticmethod
    def job_body(
        name: str, source: dict[str, Any], destination: dict[str, Any], catalog: dict[str, Any]
    ) -> dict[str, Any]:
        ends = ("id", "name", "type", "version", "config")
        return {
            "name": name,
            "source": {field: source[field] for field in ends},
            "destination": {field: destination[field] for field in ends},
            "streams_config": json.dumps(catalog),
            "frequency": "0 0 1 1 *",
            "advanced_settings": {"max_discover_threads": 50},
        }


@pytest.fixture
async def wizard(page: Rest, postgres_database: str, tmp_path: Path) -> Wizard:
    await execute(postgres_database, TABLES)
    return Wizard(page, postgres_database, tmp_path)


async def test_a_job_is_set_up_run_watched_changed_and_deleted(wizard: Wizard, page: Rest) -> None:
    source = await wizard.create_endpoint("sources", "postgres")
    destination = await wizard.create_endpoint("destinations", "parquet")
    job = await wizard.create_job(source, destination)
    assert (job["activate"], job["frequency"]) == (True, "0 0 1 1 *")
    assert (job["source"]["name"], job["destination"]["type"]) == (source["name"], "parquet")

    assert (await page.project("POST", f"jobs/{job['id']}/sync", {}))["message"]
    run = await await_end(page, job["id"])
    [task] = await page.project("GET", f"jobs/{job['id']}/tasks")
    assert (task["status"], task["job_type"]) == ("completed", "sync")
    log = await page.project(
        "POST",
        f"jobs/{job['id']}/tasks/1/logs",
        {"file_path": task["file_path"]},
        cursor=-1,
        limit=1000,
        direction="older",
    )
    messages = [line["message"] for line in log["logs"]]
    assert messages[0].startswith(f"Run of the job '{job['name']}' started: attempt 1 of ")
    assert messages[-1] == "Sync completed, wait 5 seconds cleanup in progress..."
    assert (log["has_more_older"], log["has_more_newer"]) == (False, False)
    archive = await page.answer(
        "GET",
        f"/api/v1/project/{page.project_id}/jobs/{job['id']}/logs/download",
        headers={"Range": "bytes=0-0"},
        file_path=run["file_path"],
    )
    assert archive.status == 206

    [of_source] = (await page.project("GET", f"sources/{source['id']}"))["jobs"]
    assert (of_source["name"], of_source["last_run_state"]) == (job["name"], "completed")
    assert (of_source["destination_name"], of_source["destination_type"]) == (destination["name"], "parquet")

    whole = await page.project("GET", f"jobs/{job['id']}")
    unchanged = {"updated_streams_config": whole["streams_config"]}
    difference = f"jobs/{job['id']}/stream-difference"
    assert (await page.project("POST", difference, unchanged))["difference_streams"] == {}
    catalog = json.loads(whole["streams_config"])
    catalog["selected_streams"]["public"] = [
        item for item in catalog["selected_streams"]["public"] if item["stream_name"] == "orders"
    ]
    body = wizard.job_body(job["name"], whole["source"], whole["destination"], catalog) | {"activate": True}
    chosen = {"updated_streams_config": body["streams_config"]}
    differing = (await page.project("POST", difference, chosen))["difference_streams"]
    await page.project("PUT", f"jobs/{job['id']}", {**body, "difference_streams": json.dumps(differing)})

    assert (await page.project("POST", f"jobs/{job['id']}/clear-destination"))["message"]
    await await_end(page, job["id"])
    assert (await page.project("GET", f"jobs/{job['id']}/clear-destination"))["running"] is False
    assert (await page.project("GET", f"jobs/{job['id']}/tasks"))[0]["job_type"] == "clear"
    assert (await page.project("POST", f"jobs/{job['id']}/activate", {"activate": False}))["activate"] is False

    used = await page.answer("DELETE", f"/api/v1/project/{page.project_id}/sources/{source['id']}")
    assert (used.status, job["name"] in used.body["message"]) == (409, True)
    await page.project("DELETE", f"jobs/{job['id']}")
    await page.project("DELETE", f"sources/{source['id']}")
    await page.project("DELETE", f"destinations/{destination['id']}")
    assert await page.project("GET", "jobs") == []


async def test_the_poll_of_the_jobs_is_small(wizard: Wizard, page: Rest) -> None:
    """The page asks for the list every five seconds."""
    source = await wizard.create_endpoint("sources", "postgres")
    job = await wizard.create_job(source, await wizard.create_endpoint("destinations", "parquet"))
    jobs = f"/api/v1/project/{page.project_id}/jobs"
    compressed = {"Accept-Encoding": "gzip"}
    first = await page.answer("GET", jobs, headers=compressed)
    assert first.headers["Content-Encoding"] == "gzip"
    again = await page.answer("GET", jobs, headers=compressed | {"If-None-Match": first.headers["ETag"]})
    assert again.status == 304
    await page.project("POST", f"jobs/{job['id']}/sync", {})
    async with asyncio.timeout(10):
        while (await page.answer("GET", jobs, headers={"If-None-Match": first.headers["ETag"]})).status == 304:
            await asyncio.sleep(0.05)
    await await_end(page, job["id"])


async def test_settings_are_of_the_pages_project(page: Rest) -> None:
    settings = await page.project("GET", "settings")
    assert settings == {"id": page.project_id, "project_id": str(page.project_id), "webhook_alert_url": ""}
    kept = await page.project("PUT", "settings", settings | {"webhook_alert_url": "https://example.com/hook"})
    assert kept["webhook_alert_url"] == "https://example.com/hook"
