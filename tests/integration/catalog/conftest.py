"""A running catalog: one a module, in a project of each test's own."""

import uuid
from collections.abc import AsyncIterator

import pytest

from tests.integration.catalog.catalog import Catalog, running_catalog


@pytest.fixture(scope="module")
async def shared_catalog(mongod: str) -> AsyncIterator[Catalog]:
    """One instance for the tests of a module."""
    prefix = f"test_{uuid.uuid4().hex[:10]}_"
    async with running_catalog(mongod, prefix) as instance:
        yield instance
        for database in ("catalog", "job_orchestrator"):
            await instance.context.store.client.drop_database(prefix + database)


@pytest.fixture
def catalog(shared_catalog: Catalog) -> Catalog:
    """The instance, in a project that has nothing yet."""
    return shared_catalog.in_new_project()
