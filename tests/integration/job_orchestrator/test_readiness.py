"""What the orchestrator says of itself and of its workers."""

from datetime import timedelta

import pytest

from libs.contracts.internal import CLAIM_WORK, ClaimWork
from libs.process.health import Health
from libs.service.running import running_service
from services.job_orchestrator.app import SERVICE
from services.job_orchestrator.config import JobOrchestratorSettings
from services.job_orchestrator.workers import ABSENT_SECONDS, WORKERS
from tests.integration.job_orchestrator.orchestrator import Orchestrator


async def problem(health: Health, name: str) -> str:
    return (await health.report())[name] or ""


async def test_it_is_told_since_when_no_worker_asked_for_runs(orchestrator: Orchestrator) -> None:
    health = orchestrator.context.health
    assert await problem(health, "worker") == "no worker has ever asked for runs"
    await orchestrator.as_worker(CLAIM_WORK, ClaimWork(worker_id="w1"))
    assert await problem(health, "worker") == ""
    workers = orchestrator.context.documents.plain(WORKERS)
    last = (await workers.find_one({"_id": "w1"}) or {})["seen_at"] - timedelta(seconds=ABSENT_SECONDS + 1)
    await workers.update_one({"_id": "w1"}, {"$set": {"seen_at": last}})
    assert f"{last:%Y-%m-%dT%H:%M:%S}" in await problem(health, "worker")


@pytest.mark.parametrize("name", ["signing_key", "trusted_keys"])
async def test_keys_that_are_missing_are_named_by_the_service_that_lacks_them(
    mongod: str, database_prefix: str, name: str
) -> None:
    settings = JobOrchestratorSettings(mongodb_url=mongod, database_prefix=database_prefix, port=0)
    async with running_service(SERVICE, settings) as service:
        said = await problem(service.context.health, name)
    assert name.upper() in said
    assert ("catalog" if name == "signing_key" else "gateway") in said
