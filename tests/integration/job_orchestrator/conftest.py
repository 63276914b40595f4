"""A running orchestrator with a stand-in for catalog's reservations: one a module, and one a test."""

import uuid
from collections.abc import AsyncIterator

import pytest

from tests.integration.job_orchestrator.orchestrator import (
    CatalogStandIn,
    Orchestrator,
    running_orchestrator,
    standing_in_for_catalog,
)


@pytest.fixture(scope="module")
async def catalog() -> AsyncIterator[tuple[CatalogStandIn, str]]:
    """The stand-in and its address."""
    async with standing_in_for_catalog() as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
async def shared_orchestrator(mongod: str, catalog: tuple[CatalogStandIn, str]) -> AsyncIterator[Orchestrator]:
    """One instance for the tests of a module that keep to projects of their own."""
    prefix = f"test_{uuid.uuid4().hex[:10]}_"
    async with running_orchestrator(mongod, prefix, catalog[1]) as instance:
        yield instance


@pytest.fixture
async def orchestrator(
    mongod: str, database_prefix: str, catalog: tuple[CatalogStandIn, str]
) -> AsyncIterator[Orchestrator]:
    """An instance of the test's own, which retries at once."""
    async with running_orchestrator(
        mongod, database_prefix, catalog[1], run_lease_seconds=60, retry_backoff_seconds=0.01
    ) as instance:
        yield instance


@pytest.fixture
async def impatient_orchestrator(
    mongod: str, database_prefix: str, catalog: tuple[CatalogStandIn, str]
) -> AsyncIterator[Orchestrator]:
    """An instance that hands out the runs of workers that were silent for half a second."""
    async with running_orchestrator(mongod, database_prefix, catalog[1], run_lease_seconds=0.5) as instance:
        yield instance
