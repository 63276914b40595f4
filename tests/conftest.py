"""The real servers that tests share, each started once a session and only when a test asks for it."""

import random
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pymongo
import pytest
from hypothesis import is_hypothesis_test, settings

from libs.testing.databases import new_database
from libs.testing.servers import Kafka, Mongod, Postgres, ServerUnavailable
from libs.testing.walks import LONG, SAMPLE, Walk


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--walk", choices=(SAMPLE, LONG), default=SAMPLE, help="how far randomised tests walk")
    parser.addoption("--seed", type=int, help="the seed of random walks; a new one by default")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile(config.option.walk)
    if config.option.seed is None:
        # The processes of xdist are given this one's options.
        config.option.seed = random.randrange(1 << 32)


def pytest_report_header(config: pytest.Config) -> str:
    return f"random walks: {config.option.walk}, --seed={config.option.seed}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that walk at random, so that they can be selected."""
    for item in items:
        if isinstance(item, pytest.Function) and ("walk" in item.fixturenames or is_hypothesis_test(item.obj)):
            item.add_marker("randomised")


@pytest.fixture
def walk(request: pytest.FixtureRequest) -> Walk:
    """How far this test walks, and its choices; the report of a failure shows the seed."""
    options = request.config.option
    request.node.add_report_section("setup", "walk", f"repeat it with --walk={options.walk} --seed={options.seed}")
    return Walk.of(options.seed, request.node.nodeid, is_long=options.walk == LONG)


@pytest.fixture(scope="session")
def mongod() -> Iterator[str]:
    """The URL of a MongoDB replica set of one."""
    with Mongod() as server:
        yield server.url


@pytest.fixture
def database_prefix(mongod: str) -> Iterator[str]:
    """What the names of this test's MongoDB databases begin with; they are dropped afterwards."""
    prefix = f"test_{uuid.uuid4().hex[:10]}_"
    yield prefix
    with pymongo.MongoClient[dict[str, Any]](mongod) as client:
        for name in client.list_database_names():
            if name.startswith(prefix):
                client.drop_database(name)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A PostgreSQL server; its ``dsn_of(database)`` gives addresses."""
    with Postgres() as server:
        yield server


@pytest.fixture(scope="session")
def postgres(postgres_server: Postgres) -> str:
    """The superuser's DSN of a PostgreSQL server."""
    return postgres_server.dsn


@pytest.fixture
async def postgres_database(postgres_server: Postgres) -> AsyncIterator[str]:
    """The superuser's DSN of an empty database of this test's own."""
    async with new_database(postgres_server) as dsn:
        yield dsn


@pytest.fixture(scope="session")
def kafka_server() -> Iterator[Kafka]:
    """An Apache Kafka; the test is skipped where Java or Maven is missing."""
    server = Kafka()
    try:
        server.start()
    except ServerUnavailable as missing:
        server.remove()
        pytest.skip(f"no Kafka: {missing}")
    except BaseException:
        server.remove()
        raise
    yield server
    server.remove()


@pytest.fixture(scope="session")
def kafka(kafka_server: Kafka) -> str:
    """The bootstrap servers of an Apache Kafka."""
    return kafka_server.bootstrap_servers


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def event_log_kind(request: pytest.FixtureRequest) -> str:
    """Runs the test once on each event log, by name."""
    kind: str = request.param
    if kind == "kafka":
        request.getfixturevalue("kafka")
    return kind


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly that half of the suite did not run; the reports tell it, whichever process ran the tests."""
    reasons = {str(report.longrepr) for report in terminalreporter.stats.get("skipped", ())}
    missing = sorted({reason.split("no Kafka: ", 1)[1] for reason in reasons if "no Kafka: " in reason})
    if missing:
        terminalreporter.write_sep("!", f"EVERY TEST ON KAFKA WAS SKIPPED: {missing[0]}", red=True, bold=True)
