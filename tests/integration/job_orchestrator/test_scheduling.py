"""Ticks: each becomes one run, whatever number of instances looks after them, and missed ones one in all."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from libs.core.clock import ManualClock, SystemClock
from libs.core.envelope import Metadata
from libs.core.errors import FixRequest
from libs.core.json import JsonObject
from services.job_orchestrator.domain.job import JOB
from services.job_orchestrator.domain.run import RUN
from services.job_orchestrator.measurements import Measurements
from services.job_orchestrator.run_control import RunControl
from services.job_orchestrator.scheduler import Scheduler
from tests.integration.job_orchestrator.orchestrator import CatalogStandIn, Orchestrator, running_orchestrator


class Instances:
    """Two instances on one store and one clock, each with a scheduler that needs no lease."""

    def __init__(self, clock: ManualClock, instances: list[Orchestrator]) -> None:
        self.clock = clock
        self.first = instances[0]
        self.all = instances
        self.controls = [
            RunControl(i.context.documents, i.context.commands, SystemClock(), lambda: None) for i in instances
        ]
        self.schedulers = [
            Scheduler(i.context.documents, control, clock, asyncio.Event())
            for i, control in zip(instances, self.controls, strict=True)
        ]

    async def rounds(self) -> None:
        """Let both schedulers look at the same time."""
        await asyncio.gather(*(scheduler.round() for scheduler in self.schedulers))

    async def runs(self, job_id: int) -> list[JsonObject]:
        return await self.first.tasks(job_id)

    async def finish_run(self) -> None:
        await self.first.finish(await self.first.claimed())


@pytest.fixture
async def instances(mongod: str, database_prefix: str, catalog: tuple[CatalogStandIn, str]) -> AsyncIterator[Instances]:
    clock = ManualClock()
    async with (
        running_orchestrator(mongod, database_prefix, catalog[1], clock=clock, run_lease_seconds=60) as one,
        running_orchestrator(mongod, database_prefix, catalog[1], clock=clock, run_lease_seconds=60) as two,
    ):
        yield Instances(clock, [one, two])


async def test_racing_instances_start_each_tick_once(instances: Instances) -> None:
    jobs = [await instances.first.create_job(f"job {n}", frequency="* * * * *") for n in range(5)]
    for tick in range(1, 4):
        instances.clock.advance(60)
        await instances.rounds()
        for job_id in jobs:
            assert len(await instances.runs(job_id)) == tick
        for _ in jobs:
            await instances.finish_run()
    histories = await asyncio.gather(*(instances.first.get(f"/jobs/{job_id}/history") for job_id in jobs))
    for history in histories:
        ticks = [e["data"]["scheduled_for"] for e in history.data if e["type"] == "job_run_requested"]
        assert len(ticks) == len(set(ticks)) == 3


async def test_the_same_tick_on_two_instances_is_one_run(instances: Instances) -> None:
    job_id = await instances.first.create_job(frequency="* * * * *")
    job = await instances.first.context.documents.require(JOB, job_id, 123)
    tick = instances.clock.now() + timedelta(minutes=1)
    begun = await asyncio.gather(
        *(
            instances.controls[n % 2].begin(
                int(job.id), "sync", "schedule", Metadata(project_id=123), scheduled_for=tick
            )
            for n in range(20)
        ),
        return_exceptions=True,
    )
    assert len([item for item in begun if isinstance(item, str)]) == 1
    assert all(isinstance(item, str | FixRequest) for item in begun)
    assert len(await instances.runs(job_id)) == 1


async def test_missed_ticks_become_one_run(instances: Instances) -> None:
    job_id = await instances.first.create_job(frequency="*/5 * * * *")
    instances.clock.advance(3600 + 120)
    await instances.rounds()
    await instances.finish_run()
    await instances.rounds()
    assert len(await instances.runs(job_id)) == 1
    history = (await instances.first.get(f"/jobs/{job_id}/history")).data
    [requested] = [event for event in history if event["type"] == "job_run_requested"]
    assert requested["data"]["scheduled_for"] == "2026-01-01T01:00:00Z"


async def test_ticks_during_a_run_are_passed_over(instances: Instances) -> None:
    job_id = await instances.first.create_job(frequency="*/5 * * * *")
    instances.clock.advance(300)
    await instances.rounds()
    instances.clock.advance(720)
    await instances.rounds()
    await instances.finish_run()
    await instances.rounds()
    assert len(await instances.runs(job_id)) == 1
    instances.clock.advance(180)
    await instances.rounds()
    assert len(await instances.runs(job_id)) == 2


async def test_a_paused_or_deleted_job_has_no_ticks(instances: Instances) -> None:
    paused = await instances.first.create_job("paused", frequency="* * * * *")
    deleted = await instances.first.create_job("deleted", frequency="* * * * *")
    await instances.first.post(f"/jobs/{paused}/activate", {"activate": False})
    await instances.first.request("DELETE", f"/jobs/{deleted}")
    instances.clock.advance(600)
    await instances.rounds()
    assert await instances.runs(paused) == []
    assert await instances.first.claim() is None
    assert (await instances.first.post(f"/jobs/{paused}/sync")).status == 200
    assert (await instances.first.post(f"/jobs/{paused}/activate", {"activate": True})).status == 200


async def test_a_clock_that_is_set_back_stops_no_schedule_and_repeats_no_daily_run(instances: Instances) -> None:
    each_minute = await instances.first.create_job("minutes", frequency="* * * * *")
    daily = await instances.first.create_job("daily", frequency="0 3 * * *")
    instances.clock.advance(3 * 3600 + 60)
    await instances.rounds()
    for _ in range(2):
        await instances.finish_run()
    assert (len(await instances.runs(each_minute)), len(await instances.runs(daily))) == (1, 1)
    instances.clock.advance(-2 * 3600)
    for tick in range(2, 5):
        await instances.rounds()
        await instances.rounds()
        assert len(await instances.runs(each_minute)) == tick
        await instances.finish_run()
        await instances.rounds()
        assert len(await instances.runs(each_minute)) == tick
        instances.clock.advance(60)
    for minutes in (60 + 56, 1, 1, 1):
        # 3:00, which comes for the second time, and a few minutes after it
        instances.clock.advance(60 * minutes)
        await instances.rounds()
        assert len(await instances.runs(daily)) == 1
    instances.clock.advance(24 * 3600)
    await instances.rounds()
    assert len(await instances.runs(daily)) == 2


async def test_a_run_that_waits_when_the_clock_is_set_back_is_handed_out(instances: Instances) -> None:
    job_id = await instances.first.create_job()
    await instances.first.post(f"/jobs/{job_id}/sync")
    instances.clock.advance(-2 * 3600)
    await instances.finish_run()
    assert [run["status"] for run in await instances.runs(job_id)] == ["completed"]


async def test_a_job_that_can_not_be_read_stops_neither_ticks_nor_claims_nor_clearing_of_others(
    instances: Instances,
) -> None:
    broken, whole = [await instances.first.create_job(name, frequency="* * * * *") for name in ("a", "b")]
    odd = await instances.first.create_job("c", frequency="* * * * *")
    waiting = await instances.first.create_job("d")
    await instances.first.post(f"/jobs/{waiting}/sync")
    jobs = instances.first.context.documents.collection(JOB.collection)
    await jobs.update_one({"_id": broken}, {"$set": {"state.definition.name": None}})
    await jobs.update_one({"_id": odd}, {"$set": {"state.definition.frequency": "nonsense"}})
    await jobs.update_one({"_id": waiting}, {"$set": {"state.definition": {}}})
    instances.clock.advance(60)
    await instances.rounds()
    assert len(await instances.runs(whole)) == 1
    run = await instances.first.claimed()
    assert run.job_id == whole


async def test_a_run_that_can_not_be_read_stops_no_claim(instances: Instances) -> None:
    first, second = [await instances.first.create_job(name) for name in ("a", "b")]
    for job_id in (first, second):
        await instances.first.post(f"/jobs/{job_id}/sync")
    runs = instances.first.context.documents.collection(RUN.collection)
    await runs.update_one({"state.job_id": first}, {"$set": {"state.kind": "magic"}})
    await Measurements(instances.first.context.documents, instances.clock).measure()
    assert (await instances.first.claimed()).job_id == second


async def test_the_running_service_starts_what_is_due_by_itself(
    mongod: str, database_prefix: str, catalog: tuple[CatalogStandIn, str]
) -> None:
    clock = ManualClock()
    async with running_orchestrator(mongod, database_prefix, catalog[1], clock=clock) as instance:
        job_id = await instance.create_job(frequency="@hourly")
        clock.advance(3600)
        async with asyncio.timeout(10):
            while not await instance.tasks(job_id):
                await asyncio.sleep(0.05)
        assert (await instance.get(f"/jobs/{job_id}")).data["last_run_state"] == "scheduled"
