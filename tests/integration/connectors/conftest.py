"""Two databases of a real PostgreSQL, and a directory, to move tables between."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from libs.testing.databases import new_database
from libs.testing.servers import Postgres
from tests.integration.connectors.moving import Lake, Server


@pytest.fixture
async def source(postgres_database: str) -> AsyncIterator[Server]:
    async with Server.connected(postgres_database) as server:
        yield server


@pytest.fixture
async def destination(postgres_server: Postgres) -> AsyncIterator[Server]:
    async with new_database(postgres_server) as dsn, Server.connected(dsn) as server:
        yield server


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(tmp_path / "lake")
