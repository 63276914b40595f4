"""The declared topics on a real broker, and the log with a broker that is unreachable or has other topics."""

import asyncio
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import GroupCoordinatorNotAvailableError

from libs.contracts.catalog import TOPIC
from libs.contracts.runs import TOPIC as RUNS
from libs.contracts.topics import OWNERS
from libs.event_log.kafka import (
    Brokers,
    DeclaredTopic,
    KafkaEventLog,
    TopicMismatch,
    declared_topics,
    ensure_topics,
    group_progress,
)
from libs.suite.child_process import free_port
from libs.testing.servers import Kafka, ServerUnavailable
from tests.contract.test_event_log import SOURCE, envelope_of, read

DAYS_30_MS = str(30 * 24 * 3600 * 1000)


def test_every_topic_is_declared_with_twelve_partitions() -> None:
    topics = {topic.name: topic for topic in declared_topics()}
    assert topics.keys() == OWNERS.keys()
    assert {topic.partitions for topic in topics.values()} == {12}
    for name, topic in topics.items():
        assert topic.config["retention.ms"] == (DAYS_30_MS if name == RUNS else "-1")
        assert topic.config["max.message.bytes"] == str(2 * 1024 * 1024)


@pytest.mark.kafka
async def test_missing_topics_are_created_as_declared_and_repeating_it_is_no_error(kafka: str) -> None:
    prefix = f"{uuid.uuid4().hex[:8]}."
    await asyncio.gather(ensure_topics(Brokers(kafka), prefix), ensure_topics(Brokers(kafka), prefix))
    await ensure_topics(Brokers(kafka), prefix)
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        [described] = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, prefix + RUNS)])
    finally:
        await admin.close()
    config = {name: value for name, value, *_ in described.resources[0][4]}
    assert (config["retention.ms"], config["max.message.bytes"]) == (DAYS_30_MS, "2097152")


@pytest.mark.kafka
async def test_a_topic_with_another_number_of_partitions_is_refused(kafka: str) -> None:
    prefix = f"{uuid.uuid4().hex[:8]}."
    await ensure_topics(Brokers(kafka), prefix, [DeclaredTopic(TOPIC, 3, -1, {})])
    with pytest.raises(TopicMismatch, match="has 3 partitions, declared are 12"):
        await ensure_topics(Brokers(kafka), prefix)


@pytest.mark.kafka
async def test_a_topic_that_is_not_declared_is_never_created_by_using_it(kafka: str) -> None:
    log = KafkaEventLog(kafka, "test", f"{uuid.uuid4().hex[:8]}.")
    with pytest.raises(OSError, match="does not exist"):
        async with log.subscribe("datasync.nobody.v1", {}):
            raise AssertionError
    await log.close()


async def test_a_log_opened_while_the_broker_is_unreachable_creates_its_topics_later() -> None:
    server = Kafka()
    log = KafkaEventLog(server.bootstrap_servers, "test")
    event = envelope_of("source-1", SOURCE, position=1)
    with pytest.raises(OSError, match="Kafka"):
        await log.publish(TOPIC, [event])
    try:
        await asyncio.to_thread(server.start)
        await log.publish(TOPIC, [event])
        async with log.subscribe(TOPIC, {}) as subscription:
            [message] = await read(subscription, 1)
            assert (message.event_id, len(await subscription.end_offsets())) == (event.id, 12)
    except ServerUnavailable as missing:
        pytest.skip(f"no Kafka: {missing}")
    finally:
        await log.close()
        await asyncio.to_thread(server.remove)


async def test_an_unreachable_broker_is_an_os_error() -> None:
    log = KafkaEventLog(f"127.0.0.1:{free_port()}", "test")
    with pytest.raises(OSError, match="Kafka"):
        await log.publish(TOPIC, [envelope_of("source-1", SOURCE, position=1)])
    with pytest.raises(OSError, match="Kafka"):
        async with log.subscribe(TOPIC, {}):
            raise AssertionError
    await log.close()


@pytest.mark.kafka
async def test_monitoring_tools_see_the_progress_of_a_service(kafka: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_progress, "PROGRESS_SECONDS", 0.0)
    prefix = f"{uuid.uuid4().hex[:8]}."
    await ensure_topics(Brokers(kafka), prefix)
    log = KafkaEventLog(kafka, "catalog", prefix)
    await log.publish(TOPIC, [envelope_of("source-1", SOURCE, position=1)])
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        async with log.subscribe(TOPIC, {}) as subscription:
            [message] = await read(subscription, 1)
            async with asyncio.timeout(20):
                while await _committed(admin, f"{prefix}datasync.catalog") != {message.partition: 1}:
                    await subscription.report_progress({message.partition: message.offset + 1})
                    await asyncio.sleep(0.05)
    finally:
        await admin.close()
        await log.close()


async def _committed(admin: AIOKafkaAdminClient, group: str) -> dict[int, int]:
    try:
        offsets = await admin.list_consumer_group_offsets(group)
    except GroupCoordinatorNotAvailableError:
        # The broker creates its topic of group offsets when the first group appears.
        return {}
    return {place.partition: item.offset for place, item in offsets.items() if item.offset >= 0}


def test_an_installed_wheel_declares_the_same_topics(tmp_path: Path) -> None:
    """The declaration is part of the package, so it needs no checkout."""
    root = Path(group_progress.__file__).resolve().parents[3]
    checkout, built = tmp_path / "checkout", tmp_path / "built"
    for name in ("libs", "services"):
        shutil.copytree(root / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(root / name, checkout)
    build = "from setuptools import setup; setup()"
    subprocess.run([sys.executable, "-c", build, "-q", "build", "--build-lib", str(built)], cwd=checkout, check=True)
    ask = "from libs.event_log.kafka import declared_topics as topics; print(*[topic.name for topic in topics()])"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(built)}
    told = subprocess.run(
        [sys.executable, "-P", "-c", ask], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == [topic.name for topic in declared_topics()]
