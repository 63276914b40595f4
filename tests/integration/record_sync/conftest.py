"""A running record sync service: one a module, in a project of each test's own."""

import uuid
from collections.abc import AsyncIterator

import pytest

from tests.integration.record_sync.record_service import RecordService, running_record_service


@pytest.fixture(scope="module")
async def shared_service(mongod: str) -> AsyncIterator[RecordService]:
    """One instance for the tests of a module."""
    prefix = f"test_{uuid.uuid4().hex[:10]}_"
    async with running_record_service(mongod, prefix) as instance:
        yield instance
        await instance.context.store.client.drop_database(prefix + "record_sync")


@pytest.fixture
def service(shared_service: RecordService) -> RecordService:
    """The instance, in a project that has nothing yet."""
    return shared_service.in_new_project()
