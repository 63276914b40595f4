"""A store that is killed in the middle: callers are told to come back, and nothing acknowledged is lost."""

import asyncio

from libs.contracts.internal import CLAIM_WORK, ClaimWork
from libs.testing.servers import Mongod
from tests.integration.job_orchestrator.orchestrator import CatalogStandIn, job_body, running_orchestrator


async def test_a_killed_store_is_503_and_a_run_goes_on_after_it(catalog: tuple[CatalogStandIn, str]) -> None:
    with Mongod() as mongod:
        async with running_orchestrator(mongod.url, "fault_", catalog[1], run_lease_seconds=60) as orchestrator:
            job_id = await orchestrator.create_job()
            await orchestrator.post(f"/jobs/{job_id}/sync")
            run = await orchestrator.claimed()

            await asyncio.to_thread(mongod.kill)
            calls = [
                orchestrator.get(f"/jobs/{job_id}"),
                orchestrator.get(f"/jobs/{job_id}/tasks"),
                orchestrator.post("/jobs", job_body("other")),
            ]
            for answer in await asyncio.gather(*calls):
                assert (answer.status, answer.body["success"]) == (503, False), answer.body
                assert "Retry-After" in answer.headers

            await asyncio.to_thread(mongod.start)
            async with asyncio.timeout(30):
                while (await orchestrator.get(f"/jobs/{job_id}")).status != 200:
                    await asyncio.sleep(0.1)
            assert (await orchestrator.heartbeat(run)).verdict == "continue"
            assert await orchestrator.finish(run) == "recorded"
            assert [task["status"] for task in await orchestrator.tasks(job_id)] == ["completed"]
            again = await orchestrator.as_worker(CLAIM_WORK, ClaimWork(worker_id="w2"))
            assert again.run is None
