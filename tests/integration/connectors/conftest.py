"""Two databases of a real PostgreSQL, and a directory, to move tables between."""

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from libs.testing.servers import Postgres
from tests.integration.connectors.moving import Lake, Server


@pytest.fixture
async def source(postgres_database: str) -> AsyncIterator[Server]:
    async with Server.connected(postgres_database) as server:
        yield server


@pytest.fixture
async def destination(postgres_server: Postgres) -> AsyncIterator[Server]:
    name = f"test_{uuid.uuid4().hex[:10]}"
    administrator = await asyncpg.connect(postgres_server.dsn)
    try:
        await administrator.execute(f"CREATE DATABASE {name}")
        async with Server.connected(postgres_server.dsn_of(name)) as server:
            yield server
        await administrator.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await administrator.close()


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(tmp_path / "lake")
