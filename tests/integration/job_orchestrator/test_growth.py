"""What an installation gathers over the years: pages of lists, and what is forgotten when."""

from datetime import UTC, datetime, timedelta

from libs.contracts.internal import LogLine
from libs.core.clock import ManualClock
from libs.eventsourcing.retention import Retention
from libs.service import operations
from services.job_orchestrator.app import SERVICE
from services.job_orchestrator.domain.run import RUN
from services.job_orchestrator.run_records import LOGS
from tests.integration.job_orchestrator.orchestrator import CatalogStandIn, Orchestrator, running_orchestrator

DAY_SECONDS = 24 * 3600


async def ended_run(orchestrator: Orchestrator, job_id: int) -> str:
    begun = await orchestrator.post(f"/jobs/{job_id}/sync")
    run = await orchestrator.claimed()
    await orchestrator.finish(run)
    identifier: str = begun.data["task_id"]
    return identifier


async def test_every_task_is_found_page_by_page(orchestrator: Orchestrator) -> None:
    job_id = await orchestrator.create_job()
    begun = [await ended_run(orchestrator, job_id) for _ in range(7)]
    seen: list[str] = []
    while True:
        after = f"&before={seen[-1]}" if seen else ""
        page = (await orchestrator.get(f"/jobs/{job_id}/tasks?limit=3{after}")).data
        seen += [task["id"] for task in page]
        if len(page) < 3:
            break
    assert seen == begun[::-1]
    other = await orchestrator.create_job("other")
    for strange in ("nope", begun[0]):
        refused = await orchestrator.get(f"/jobs/{other}/tasks?before={strange}")
        assert (refused.status, refused.body["errors"][0]["field"]) == (400, "before")


async def test_jobs_are_listed_whole_or_page_by_page_and_a_broken_one_hides_no_other(
    orchestrator: Orchestrator,
) -> None:
    ids = [await orchestrator.create_job(f"job {number}") for number in range(5)]
    assert [job["id"] for job in (await orchestrator.get("/jobs")).data] == ids[::-1]
    first = (await orchestrator.get("/jobs?limit=2")).data
    second = (await orchestrator.get(f"/jobs?limit=2&before={first[-1]['id']}")).data
    assert [job["id"] for job in (*first, *second)] == ids[:0:-1]
    jobs = orchestrator.context.documents.collection("jobs")
    await jobs.update_one({"_id": ids[2]}, {"$unset": {"state.definition": ""}})
    assert [job["id"] for job in (await orchestrator.get("/jobs")).data] == [ids[4], ids[3], ids[1], ids[0]]


async def test_runs_are_forgotten_after_their_retention_and_a_rebuild_does_not_bring_them_back(
    mongod: str, database_prefix: str, catalog: tuple[CatalogStandIn, str]
) -> None:
    clock = ManualClock(datetime.now(UTC))
    async with running_orchestrator(
        mongod, database_prefix, catalog[1], clock=clock, run_retention_seconds=10 * DAY_SECONDS
    ) as orchestrator:
        job_id = await orchestrator.create_job()
        old = await ended_run(orchestrator, job_id)
        clock.advance(6 * DAY_SECONDS)
        young = await ended_run(orchestrator, job_id)
        waiting = (await orchestrator.post(f"/jobs/{job_id}/sync")).data["task_id"]
        clock.advance(5 * DAY_SECONDS)
        retention = Retention(
            orchestrator.context.documents,
            clock,
            collection=RUN.collection,
            field="state.finished_at",
            keep_seconds=10 * DAY_SECONDS,
        )
        assert await retention.sweep() == 1
        assert [task["id"] for task in await orchestrator.tasks(job_id)] == [waiting, young]
        assert (await orchestrator.get(f"/jobs/{job_id}/tasks/{old}")).status == 404
        report = await operations.rebuild(SERVICE, orchestrator.context.settings, swap=False)
        assert {item.name for item in report.collections if item.different_count} == set()
        # A run that waited longer than the retention is as good as any other.
        await orchestrator.finish(await orchestrator.claimed())
        assert (await orchestrator.tasks(job_id))[0]["status"] == "completed"


async def test_lines_of_logs_are_kept_as_long_as_runs(orchestrator: Orchestrator) -> None:
    await orchestrator.post(f"/jobs/{await orchestrator.create_job()}/sync")
    now = datetime.now(UTC)
    await orchestrator.heartbeat(await orchestrator.claimed(), [LogLine(time=now, level="info", message="begun")])
    lines = await orchestrator.context.documents.plain(LOGS).find({}).to_list(None)
    assert lines
    keep = timedelta(days=90)
    assert all(abs(line["expires_at"] - now - keep) < timedelta(minutes=5) for line in lines)
