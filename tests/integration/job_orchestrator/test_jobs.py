"""Jobs through their routes: created, listed, changed, paused, deleted, and what the page needs of them."""

import asyncio
import json

import pytest

from libs.contracts.internal import JOBS_EXISTING, JobsAsked, LogLine
from libs.core.clock import SystemClock
from libs.testing.waiting import until_after
from tests.integration.job_orchestrator.orchestrator import (
    STRANGER,
    STRANGERS_PROJECT,
    STREAMS,
    CatalogStandIn,
    Orchestrator,
    job_body,
)

CHUNKED = STREAMS | {"selected_streams": {"public": [{"stream_name": "flights", "chunk_column": "id"}]}}


async def test_a_new_job_echoes_what_was_sent_and_is_read_as_the_page_needs_it(orchestrator: Orchestrator) -> None:
    body = job_body(frequency="every 15 minutes", advanced_settings={"max_discover_threads": 5})
    unknown = {"filter": "", "source": body["source"] | {"disabled": False}}
    created = await orchestrator.post("/jobs", body | unknown)
    assert created.data == {**body, "id": created.data["id"]}
    [listed] = (await orchestrator.get("/jobs")).data
    assert listed["source"] == {
        "id": 1,
        "name": "source-1",
        "type": "postgres",
        "version": "v1.0.0",
        "config": '{"host":"db"}',
    }
    assert listed["destination"]["name"] == "destination-2"
    assert json.loads(listed["streams_config"]) == STREAMS
    assert (listed["frequency"], listed["activate"]) == ("*/15 * * * *", True)
    assert (listed["created_by"], listed["updated_by"]) == ("ada", "ada")
    assert "last_run_time" not in listed
    one = await orchestrator.get(f"/jobs/{created.data['id']}")
    assert one.data == listed
    assert one.data["advanced_settings"] == {"max_discover_threads": 5}


async def test_an_inline_end_is_made_by_catalog_and_its_secret_is_not_echoed(
    orchestrator: Orchestrator, catalog: tuple[CatalogStandIn, str]
) -> None:
    source = {"name": "shop", "type": "postgres", "version": "v1.0.0", "config": '{"host":"a","password":"s3cret"}'}
    destination = {"name": "lake", "type": "parquet", "version": "v1.0.0", "config": {"local_path": "/x"}}
    created = await orchestrator.post("/jobs", job_body(source=source, destination=destination))
    assert json.loads(created.data["source"]["config"]) == {"host": "a", "password": "masked"}
    assert created.data["destination"]["config"] == {"local_path": "/x", "password": "masked"}
    reservation = catalog[0].reservations[-1]
    assert reservation.source.config == {"host": "a", "password": "s3cret"}
    assert (reservation.job_id, reservation.actor) == (created.data["id"], "ada")


async def test_expand_gives_objects(orchestrator: Orchestrator) -> None:
    job_id = await orchestrator.create_job()
    job = (await orchestrator.get(f"/jobs/{job_id}?expand=config")).data
    assert job["source"]["config"] == {"host": "db"}
    assert job["streams_config"] == STREAMS


async def test_jobs_are_listed_newest_first_and_by_their_ends(orchestrator: Orchestrator) -> None:
    first = await orchestrator.create_job("a")
    second = await orchestrator.create_job("b", source={"id": 5}, destination={"id": 6})

    async def listed(path: str) -> list[int]:
        return [job["id"] for job in (await orchestrator.get(path)).data]

    assert await listed("/jobs") == [second, first]
    for path in ("/jobs?source_id=5", "/jobs?dest_id=6", "/jobs/source_id=5", '/jobs/dest_id="6"', "/jobs/dest_id=6"):
        assert await listed(path) == [second], path
    assert await listed("/jobs?source_id=5&dest_id=2") == []
    assert (await orchestrator.get("/jobs/dest_id=x")).status == 400


async def test_an_update_changes_what_was_sent_and_keeps_the_rest(orchestrator: Orchestrator) -> None:
    job_id = await orchestrator.create_job()
    before = (await orchestrator.get(f"/jobs/{job_id}")).headers["ETag"]
    body = job_body("daily", frequency="@daily", destination={"id": 9}, activate=False)
    changed = await orchestrator.put(f"/jobs/{job_id}", body, headers={"If-Match": before})
    assert changed.data == {**body, "id": job_id}
    job = (await orchestrator.get(f"/jobs/{job_id}")).data
    assert (job["name"], job["frequency"], job["activate"], job["destination"]["id"]) == (
        "daily",
        "0 0 * * *",
        False,
        9,
    )
    stale = await orchestrator.put(f"/jobs/{job_id}", body, headers={"If-Match": before})
    assert stale.status == 412


async def test_a_second_job_of_the_same_name_is_refused_until_the_first_is_deleted(orchestrator: Orchestrator) -> None:
    job_id = await orchestrator.create_job("same")
    assert (await orchestrator.post("/check-unique", {"name": "same", "entity_type": "job"})).status == 409
    refused = await orchestrator.post("/jobs", job_body("same"))
    assert (refused.status, refused.body["success"]) == (409, False)
    other = await orchestrator.create_job("other")
    assert (await orchestrator.put(f"/jobs/{other}", job_body("same"))).status == 409
    assert (await orchestrator.request("DELETE", f"/jobs/{job_id}")).data == {"name": "same"}
    assert (await orchestrator.post("/check-unique", {"name": "same", "entity_type": "job"})).data == {"unique": True}
    assert (await orchestrator.get(f"/jobs/{job_id}")).status == 404
    await orchestrator.create_job("same")


async def test_of_many_jobs_of_one_name_at_once_one_is_created(orchestrator: Orchestrator) -> None:
    answers = await asyncio.gather(*(orchestrator.post("/jobs", job_body("popular")) for _ in range(50)))
    statuses = sorted(answer.status for answer in answers)
    assert statuses == [200] + [409] * 49


async def test_a_repeated_idempotency_key_gives_the_same_job(
    orchestrator: Orchestrator, catalog: tuple[CatalogStandIn, str]
) -> None:
    before = len(catalog[0].reservations)
    key = {"Idempotency-Key": "once"}
    first = await orchestrator.post("/jobs", job_body(), headers=key)
    again = await orchestrator.post("/jobs", job_body(), headers=key)
    assert again.data == first.data
    assert len(catalog[0].reservations) == before + 1
    assert (await orchestrator.post("/jobs", job_body("else"), headers=key)).status == 422
    assert len((await orchestrator.get("/jobs")).data) == 1


async def test_different_versions_of_the_two_ends_are_refused(orchestrator: Orchestrator) -> None:
    destination = {"name": "lake", "type": "parquet", "version": "v2.0.0", "config": {}}
    refused = await orchestrator.post("/jobs", job_body(destination=destination))
    assert refused.status == 400
    assert "same version" in refused.body["message"]


async def test_a_missing_end_is_catalogs_refusal(orchestrator: Orchestrator) -> None:
    refused = await orchestrator.post("/jobs", job_body(source={"id": 4000}))
    assert (refused.status, refused.body["message"]) == (404, "source 4000 does not exist")


async def test_a_job_is_paused_and_resumed(orchestrator: Orchestrator) -> None:
    job_id = await orchestrator.create_job()
    for activate in (False, False, True):
        answer = await orchestrator.post(f"/jobs/{job_id}/activate", {"activate": activate})
        assert answer.data == {"activate": activate}
        assert (await orchestrator.get(f"/jobs/{job_id}")).data["activate"] is activate


async def test_history_and_as_of_show_what_was(orchestrator: Orchestrator) -> None:
    job_id = await orchestrator.create_job("before")
    created_at = (await orchestrator.get(f"/jobs/{job_id}")).data["created_at"]
    await until_after()
    await orchestrator.put(f"/jobs/{job_id}", job_body("after"))
    history = (await orchestrator.get(f"/jobs/{job_id}/history")).data
    assert [event["type"] for event in history] == ["job_updated", "job_created"]
    assert history[0]["data"]["name"] == "after"
    assert history[0]["actor"] == "ada"
    assert (await orchestrator.get(f"/jobs/{job_id}?as_of={created_at}")).data["name"] == "before"
    assert (await orchestrator.get(f"/jobs/{job_id}?as_of=2020-01-01T00:00:00Z")).status == 404
    assert (await orchestrator.get(f"/jobs/{job_id}?as_of=yesterday")).status == 400


async def test_a_runs_history_and_as_of_show_what_was(orchestrator: Orchestrator) -> None:
    job_id = await orchestrator.create_job()
    await orchestrator.post(f"/jobs/{job_id}/sync")
    await until_after()
    run = await orchestrator.claimed()
    await until_after()
    await orchestrator.finish(run)
    path = f"/jobs/{job_id}/tasks/{run.run_id}"
    events = (await orchestrator.get(f"{path}/history")).data
    assert [event["type"] for event in events] == ["run_finished", "run_started", "run_queued"]
    finished, started, queued = (event["time"] for event in events)
    shown = [
        (await orchestrator.get(f"{path}?as_of={moment}")).data["status"] for moment in (queued, started, finished)
    ]
    assert shown == ["scheduled", "running", "completed"]
    assert (await orchestrator.get(f"{path}?as_of=2020-01-01T00:00:00Z")).status == 404
    newest = (await orchestrator.get(f"{path}/history?limit=1")).data
    assert [event["version"] for event in newest] == [3]
    assert (await orchestrator.get(f"/jobs/{job_id}/tasks/unknown/history")).status == 404


async def test_a_deleted_job_keeps_its_past(orchestrator: Orchestrator) -> None:
    job_id = await orchestrator.create_job("gone")
    created_at = (await orchestrator.get(f"/jobs/{job_id}")).data["created_at"]
    await orchestrator.post(f"/jobs/{job_id}/sync")
    run = await orchestrator.claimed()
    await orchestrator.heartbeat(run, [LogLine(time=SystemClock().now(), level="info", message="it began")])
    await orchestrator.finish(run)
    (task,) = await orchestrator.tasks(job_id)
    await orchestrator.request("DELETE", f"/jobs/{job_id}")
    path = f"/jobs/{job_id}"
    history = (await orchestrator.get(f"{path}/history")).data
    assert history[0]["type"] == "job_deleted"
    assert (await orchestrator.get(f"{path}?as_of={created_at}")).data["name"] == "gone"
    assert (await orchestrator.get(f"{path}?as_of={history[0]['time']}")).status == 404
    assert await orchestrator.tasks(job_id) == [task]
    one = f"{path}/tasks/{task['id']}"
    assert (await orchestrator.get(one)).data["status"] == "completed"
    assert (await orchestrator.get(f"{one}/history")).data[0]["type"] == "run_finished"
    page = await orchestrator.post(f"{one}/logs", {"file_path": task["file_path"]})
    lines = (await orchestrator.get(f"{path}/task/{task['id']}/logs")).data["task_logs"]
    assert page.data["logs"] == lines
    assert [line["message"] for line in lines] == ["it began"]
    stranger = {"principal": STRANGER, "project": STRANGERS_PROJECT}
    for read in (f"{path}/history", f"{path}/tasks", one, f"{path}?as_of={created_at}"):
        assert (await orchestrator.get(read, **stranger)).status == 404, read
    assert (await orchestrator.get(path)).status == 404
    assert (await orchestrator.post(f"{path}/sync")).status == 404


async def test_what_is_done_with_a_job_is_told_with_its_name(orchestrator: Orchestrator) -> None:
    job_id = await orchestrator.create_job("shop to lake")
    answers = []
    for path, body in (
        ("sync", {}),
        ("cancel", {}),
        ("clear-destination", {}),
        ("cancel", {}),
        ("verify", {"repair": True}),
        ("cancel", {}),
        ("activate", {"activate": False}),
    ):
        answers.append((await orchestrator.post(f"/jobs/{job_id}/{path}", body)).body["message"])
    assert answers == [
        "job shop to lake: sync started",
        "job shop to lake: the run is cancelled",
        "job shop to lake: clearing the destination started",
        "job shop to lake: the run is cancelled",
        "job shop to lake: comparing and repairing started",
        "job shop to lake: the run is cancelled",
        "job shop to lake is paused",
    ]


async def test_deleting_a_job_tells_what_becomes_of_its_run(orchestrator: Orchestrator) -> None:
    idle, waiting, running = [await orchestrator.create_job(name) for name in ("idle", "waiting", "running")]
    await orchestrator.post(f"/jobs/{running}/sync")
    await orchestrator.claimed()
    await orchestrator.post(f"/jobs/{waiting}/sync")
    answers = [await orchestrator.request("DELETE", f"/jobs/{job_id}") for job_id in (idle, waiting, running)]
    assert [answer.body["message"] for answer in answers] == [
        "job idle deleted",
        "job waiting deleted; its run was cancelled",
        "job running deleted; its run is being cancelled",
    ]


async def test_a_foreign_project_is_closed_and_its_jobs_are_not_there(orchestrator: Orchestrator) -> None:
    job_id = await orchestrator.create_job()
    assert (await orchestrator.get(f"/jobs/{job_id}", principal=STRANGER)).status == 403
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/sync"), ("GET", "/tasks"), ("POST", "/cancel")):
        answer = await orchestrator.request(
            method, f"/jobs/{job_id}{path}", principal=STRANGER, project=STRANGERS_PROJECT
        )
        assert answer.status == 404, path


async def test_an_unchanged_job_is_not_sent_again(orchestrator: Orchestrator) -> None:
    job_id = await orchestrator.create_job()
    tag = (await orchestrator.get(f"/jobs/{job_id}")).headers["ETag"]
    assert (await orchestrator.get(f"/jobs/{job_id}", headers={"If-None-Match": tag})).status == 304


async def test_stream_difference_names_what_would_be_cleared(orchestrator: Orchestrator) -> None:
    job_id = await orchestrator.create_job()
    same = await orchestrator.post(f"/jobs/{job_id}/stream-difference", {"updated_streams_config": json.dumps(STREAMS)})
    assert same.data == {"difference_streams": {}}
    changed = json.loads(json.dumps(STREAMS))
    changed["selected_streams"]["public"][0]["append_mode"] = True
    found = await orchestrator.post(
        f"/jobs/{job_id}/stream-difference", {"updated_streams_config": json.dumps(changed)}
    )
    assert found.data["difference_streams"]["selected_streams"] == {"public": [{"stream_name": "flights"}]}


async def test_settings_are_never_null(orchestrator: Orchestrator) -> None:
    assert (await orchestrator.get("/settings")).data == {
        "id": orchestrator.project,
        "project_id": str(orchestrator.project),
        "webhook_alert_url": "",
    }
    changed = {"id": 5, "project_id": str(orchestrator.project), "webhook_alert_url": "https://example.com/hook?x=1"}
    assert (await orchestrator.put("/settings", changed)).data["webhook_alert_url"] == changed["webhook_alert_url"]
    assert (await orchestrator.get("/settings")).data["webhook_alert_url"] == changed["webhook_alert_url"]
    for bad in ("ftp://x", "https://user:pass@x", "nonsense", "http://169.254.169.254/latest", "https://[::1]/"):
        refused = await orchestrator.put("/settings", {"webhook_alert_url": bad})
        assert (refused.status, refused.body["errors"][0]["field"]) == (400, "webhook_alert_url"), bad


async def test_catalog_learns_which_jobs_exist(orchestrator: Orchestrator) -> None:
    kept, deleted = await orchestrator.create_job("a"), await orchestrator.create_job("b")
    await orchestrator.request("DELETE", f"/jobs/{deleted}")
    answer = await orchestrator.catalog_client.call(JOBS_EXISTING, JobsAsked(job_ids=(kept, deleted, 999)))
    assert answer.job_ids == (kept,)


@pytest.fixture
def orchestrator(shared_orchestrator: Orchestrator) -> Orchestrator:
    """The module's instance, in a project of the test's own."""
    return shared_orchestrator.in_new_project()


DEEP = b'{"name":' + b"[" * 10_000 + b"]" * 10_000 + b"}"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{", ""),
        (b"", ""),
        (b"[]", ""),
        (b'"text"', ""),
        (DEEP, ""),
        (b'{"name": 9223372036854775808}', "name"),
        (b'{"name": "a", "name": "b"}', "name"),
        (json.dumps({}).encode(), "name"),
        (json.dumps(job_body(name="")).encode(), "name"),
        (json.dumps(job_body(name="  ")).encode(), "name"),
        (json.dumps(job_body(name="x" * 256)).encode(), "name"),
        (json.dumps(job_body() | {"name": 5}).encode(), "name"),
        (json.dumps(job_body() | {"name": "a\x00b"}).encode(), "name"),
        (json.dumps(job_body(source=None)).encode(), "source"),
        (json.dumps(job_body(source={})).encode(), "source.name"),
        (json.dumps(job_body(source={"id": "1"})).encode(), "source.id"),
        (json.dumps(job_body(source={"id": 0})).encode(), "source.id"),
        (
            json.dumps(job_body(source={"name": "a", "type": "b", "version": "c", "config": "nope"})).encode(),
            "",
        ),
        (
            json.dumps(job_body(source={"name": "a", "type": "b", "version": "c", "config": []})).encode(),
            "source.config",
        ),
        (json.dumps(job_body(frequency="* * * * * *")).encode(), "frequency"),
        (json.dumps(job_body(frequency=5)).encode(), "frequency"),
        (json.dumps(job_body(streams_config="[]")).encode(), "streams_config"),
        (json.dumps({k: v for k, v in job_body().items() if k != "streams_config"}).encode(), "streams_config"),
        (json.dumps(job_body(activate="yes")).encode(), "activate"),
        (
            json.dumps(job_body(advanced_settings={"max_discover_threads": 0})).encode(),
            "advanced_settings.max_discover_threads",
        ),
        (json.dumps(job_body(advanced_settings=[1])).encode(), "advanced_settings"),
        (json.dumps(job_body(advanced_settings={"verify": "yes"})).encode(), "advanced_settings.verify"),
        (json.dumps(job_body(advanced_settings={"verfy": True})).encode(), "advanced_settings.verfy"),
        (json.dumps(job_body(streams_config={"selected_stream": {}})).encode(), "streams_config.selected_stream"),
        (
            json.dumps(job_body(streams_config=json.dumps(CHUNKED))).encode(),
            "streams_config.selected_streams.public[0].chunk_column",
        ),
    ],
)
async def test_a_malformed_job_is_refused_by_field(orchestrator: Orchestrator, body: bytes, field: str) -> None:
    refused = await orchestrator.post("/jobs", data=body, headers={"Content-Type": "application/json"})
    assert refused.status == 400, refused.body
    assert refused.body["success"] is False
    assert refused.body["message"]
    if field:
        assert field in [error["field"] for error in refused.body["errors"]]


async def test_a_change_that_no_run_can_honour_is_refused_by_path(orchestrator: Orchestrator) -> None:
    job_id = await orchestrator.create_job()
    refused = await orchestrator.put(f"/jobs/{job_id}", job_body(streams_config=CHUNKED))
    assert refused.status == 400
    assert [error["field"] for error in refused.body["errors"]] == [
        "streams_config.selected_streams.public[0].chunk_column"
    ]


async def test_other_malformed_calls_are_refused(orchestrator: Orchestrator) -> None:
    job_id = await orchestrator.create_job()
    calls = [
        ("GET", "/jobs?source_id=x", None, 400),
        ("GET", "/jobs/abc", None, 404),
        ("GET", "/jobs/99999999999999999999999999", None, 404),
        ("PATCH", f"/jobs/{job_id}", {}, 405),
        ("POST", f"/jobs/{job_id}/activate", {}, 400),
        ("POST", f"/jobs/{job_id}/activate", {"activate": "true"}, 400),
        ("GET", f"/jobs/{job_id}/tasks?limit=0", None, 400),
        ("GET", f"/jobs/{job_id}/tasks/nope", None, 404),
        ("GET", f"/jobs/{job_id}/task/nope/logs", None, 404),
        ("POST", f"/jobs/{job_id}/tasks/x/logs?direction=up", {"file_path": "x"}, 400),
        ("POST", f"/jobs/{job_id}/tasks/x/logs?cursor=-2", {"file_path": "x"}, 400),
        ("POST", f"/jobs/{job_id}/tasks/x/logs", {}, 400),
        ("POST", f"/jobs/{job_id}/tasks/x/logs", {"file_path": "jobs/1/runs/../../etc"}, 404),
        ("GET", f"/jobs/{job_id}/logs/download", None, 400),
        ("POST", f"/jobs/{job_id}/stream-difference", {"updated_streams_config": "x"}, 400),
        ("POST", "/check-unique", {"name": "a", "entity_type": "planet"}, 400),
        ("PUT", "/settings", {"webhook_alert_url": None}, 400),
        ("POST", f"/jobs/{job_id}/cancel", None, 409),
    ]
    for method, path, body, status in calls:
        answer = await orchestrator.request(method, path, body)
        assert (answer.status, answer.body["success"]) == (status, False), (method, path, answer.body)
    plain = await orchestrator.post("/jobs", data=b"{}", headers={"Content-Type": "text/plain"})
    assert plain.status == 415
    big = b'{"name":"' + b"x" * 2_000_000 + b'"}'
    assert (await orchestrator.post("/jobs", data=big, headers={"Content-Type": "application/json"})).status == 413


async def test_settings_of_another_project_are_refused(orchestrator: Orchestrator) -> None:
    for project in (orchestrator.project, str(orchestrator.project)):
        taken = await orchestrator.put("/settings", {"webhook_alert_url": "", "project_id": project})
        assert taken.data["project_id"] == str(orchestrator.project)
    refused = await orchestrator.put("/settings", {"webhook_alert_url": "", "project_id": "999999"})
    assert (refused.status, refused.body["errors"][0]["field"]) == (400, "project_id")


async def test_a_poll_of_the_list_costs_nothing_while_nothing_changes(orchestrator: Orchestrator) -> None:
    await orchestrator.create_job()
    first = await orchestrator.get("/jobs")
    known = {"If-None-Match": first.headers["ETag"]}
    assert (await orchestrator.get("/jobs", headers=known)).status == 304
    await orchestrator.create_job(name="another")
    assert (await orchestrator.get("/jobs", headers=known)).status == 200


async def test_a_summary_leaves_out_what_is_large(orchestrator: Orchestrator) -> None:
    await orchestrator.create_job()
    [whole] = (await orchestrator.get("/jobs")).data
    [summary] = (await orchestrator.get("/jobs?view=summary")).data
    assert whole.keys() - summary.keys() == {"streams_config"}
    for side in ("source", "destination"):
        assert whole[side].keys() - summary[side].keys() == {"config"}
    assert (await orchestrator.get("/jobs?view=little")).status == 400
