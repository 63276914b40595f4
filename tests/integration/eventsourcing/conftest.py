"""Owners and followers of events, on each event log or on the embedded one alone."""

from collections.abc import AsyncIterator

import pytest

from libs.testing.followers import Installation, installation


@pytest.fixture
async def place(
    event_log_kind: str, request: pytest.FixtureRequest, mongod: str, database_prefix: str
) -> AsyncIterator[Installation]:
    """On each event log."""
    bootstrap_servers = request.getfixturevalue("kafka") if event_log_kind == "kafka" else None
    async with installation(mongod, database_prefix, bootstrap_servers) as opened:
        yield opened


@pytest.fixture
async def embedded(mongod: str, database_prefix: str) -> AsyncIterator[Installation]:
    """On the embedded log."""
    async with installation(mongod, database_prefix, None) as opened:
        yield opened
