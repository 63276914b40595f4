"""The topics that ``topics.yaml`` declares: created if they are missing, checked if they exist."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import TopicAlreadyExistsError, for_code

from libs.event_log.kafka.client import REQUEST_MS, Brokers, admin_client

TOPICS = resources.files(__package__) / "topics.yaml"
BROKER_DEFAULT = -1


class TopicMismatch(Exception):
    """A topic on the broker is not as declared; its number of partitions must never change."""


@dataclass(frozen=True, slots=True)
class DeclaredTopic:
    """One entry of ``topics.yaml``."""

    name: str
    partitions: int
    replication_factor: int
    config: Mapping[str, str]


def declared_topics() -> list[DeclaredTopic]:
    """The entries of ``topics.yaml``, each merged over the defaults there."""
    document = yaml.safe_load(TOPICS.read_text(encoding="utf-8"))
    defaults = document["defaults"]
    topics = []
    for name, own in document["topics"].items():
        merged = {**defaults, **own, "config": {**defaults["config"], **own.get("config", {})}}
        topics.append(DeclaredTopic(name, merged["partitions"], merged["replication_factor"], merged["config"]))
    return topics


async def ensure_topics(brokers: Brokers, topic_prefix: str = "", topics: Sequence[DeclaredTopic] = ()) -> None:
    """Create the declared topics that are missing, and check the others.

    Args:
        topic_prefix: precedes every name, so that several installations can share a cluster.
        topics: these instead of those in ``topics.yaml``.

    Raises:
        TopicMismatch: a topic has another number of partitions than declared.
        OSError | TimeoutError: the brokers can't be reached.
    """
    declared = {topic_prefix + topic.name: topic for topic in topics or declared_topics()}
    async with admin_client(brokers) as admin:
        existing = await _partition_counts(admin, declared)
        missing = [_new_topic(name, topic) for name, topic in declared.items() if name not in existing]
        if missing:
            await _create(admin, missing)
            existing = await _existing_after_creation(admin, declared)
    for name, topic in declared.items():
        if existing[name] != topic.partitions:
            raise TopicMismatch(
                f"the topic {name} has {existing[name]} partitions, declared are {topic.partitions}: with another "
                "number, events of one stream would get out of order. Delete the topic, create it with "
                f"{topic.partitions} partitions, and publish its history again."
            )


def _new_topic(name: str, topic: DeclaredTopic) -> NewTopic:
    # aiokafka accepts the broker's default replication factor only together with an assignment, even an empty one.
    assignments: dict[int, list[int]] | None = {} if topic.replication_factor == BROKER_DEFAULT else None
    return NewTopic(name, topic.partitions, topic.replication_factor, assignments, dict(topic.config))


async def _create(admin: AIOKafkaAdminClient, topics: Sequence[NewTopic]) -> None:
    response = await admin.create_topics(list(topics), timeout_ms=REQUEST_MS)
    for name, code, *rest in response.topic_errors:
        if code not in (0, TopicAlreadyExistsError.errno):
            raise ConnectionError(
                f"the topic {name} can't be created: {for_code(code).__name__} {rest[0] if rest else ''}"
            )


async def _partition_counts(admin: AIOKafkaAdminClient, names: Mapping[str, Any]) -> dict[str, int]:
    """The number of partitions of those topics that exist."""
    described = await admin.describe_topics(None)
    return {item["topic"]: len(item["partitions"]) for item in described if item["topic"] in names}


async def _existing_after_creation(admin: AIOKafkaAdminClient, names: Mapping[str, Any]) -> dict[str, int]:
    """Wait for new topics: their creation is acknowledged before every broker knows them."""
    while True:
        existing = await _partition_counts(admin, names)
        if len(existing) == len(names):
            return existing
        await asyncio.sleep(0.05)
