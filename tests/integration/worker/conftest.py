"""A source, a destination, and the services that hand out runs between them."""

import uuid
from collections.abc import AsyncIterator

import pytest

from tests.integration.connectors.conftest import destination, lake, source
from tests.integration.worker.installation import Installation, running_installation

__all__ = ["destination", "lake", "source"]


@pytest.fixture(scope="module")
async def shared_installation(mongod: str) -> AsyncIterator[Installation]:
    """One instance of each service; a failed run waits long enough for its retry not to disturb other tests."""
    prefix = f"test_{uuid.uuid4().hex[:10]}_"
    async with running_installation(mongod, prefix, run_lease_seconds=60, retry_backoff_seconds=300) as installation:
        yield installation


@pytest.fixture
async def installation(shared_installation: Installation) -> AsyncIterator[Installation]:
    """A project of the test's own. Its jobs are deleted, so that no run of them is left to claim."""
    installation = Installation(shared_installation.orchestrator.in_new_project())
    yield installation
    for job in installation.jobs:
        await job.orchestrator.request("DELETE", f"/jobs/{job.id}")


@pytest.fixture
async def prompt_installation(mongod: str, database_prefix: str) -> AsyncIterator[Installation]:
    """Services of the test's own, which retry at once."""
    async with running_installation(mongod, database_prefix, retry_backoff_seconds=0.01) as installation:
        yield installation


@pytest.fixture
async def impatient_installation(mongod: str, database_prefix: str) -> AsyncIterator[Installation]:
    """Services of the test's own, which hand out a run whose worker has not reported for half a second."""
    async with running_installation(mongod, database_prefix, run_lease_seconds=0.5) as installation:
        yield installation


@pytest.fixture
async def final_installation(mongod: str, database_prefix: str) -> AsyncIterator[Installation]:
    """Services of the test's own, which retry nothing: the results of an attempt that is retried are not kept."""
    async with running_installation(mongod, database_prefix, max_retries=0) as installation:
        yield installation
