"""The fixtures of auth's tests."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from tests.integration.auth.auth_service import Auth, Gateway


@pytest.fixture
async def auth(mongod: str, database_prefix: str) -> AsyncIterator[Auth]:
    async with AsyncExitStack() as stack:
        yield Auth(mongod, database_prefix, stack)


@pytest.fixture
async def gateway(auth: Auth) -> Gateway:
    return await auth.start()
