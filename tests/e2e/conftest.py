"""The whole suite, started as an operator starts it, once on each event log."""

from collections.abc import AsyncIterator, Iterator

import pytest

from libs.testing.databases import new_database
from libs.testing.rest import Rest, rest
from libs.testing.servers import Kafka, Postgres
from libs.testing.suite import Suite

QUICK = {"RETRY_BACKOFF_SECONDS": "0.2", "RUN_LEASE_SECONDS": "3", "WORKER_POLL_SECONDS": "0.5"}
"""Settings that let tests of faults come to their end sooner."""


@pytest.fixture(scope="session")
def embedded_suite() -> Iterator[Suite]:
    """A suite on the embedded log."""
    with Suite(QUICK) as suite:
        yield suite


@pytest.fixture(scope="session")
def kafka_suite(kafka: str) -> Iterator[Suite]:
    """A suite on a Kafka of its own: the public history on the log belongs to one installation."""
    with Kafka() as broker, Suite({**QUICK, "KAFKA_BOOTSTRAP_SERVERS": broker.bootstrap_servers}) as suite:
        yield suite


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def suite(request: pytest.FixtureRequest) -> Suite:
    """Runs the test on each event log."""
    running: Suite = request.getfixturevalue(f"{request.param}_suite")
    return running


@pytest.fixture
async def api(suite: Suite) -> AsyncIterator[Rest]:
    """A client with the installation's first key."""
    async with rest(suite.base_url, api_key=suite.api_key) as client:
        yield client


@pytest.fixture
async def replica(postgres_server: Postgres) -> AsyncIterator[str]:
    """An empty database beside the source's."""
    async with new_database(postgres_server) as dsn:
        yield dsn
