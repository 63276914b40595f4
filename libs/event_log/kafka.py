"""The log on Apache Kafka: the one door to aiokafka.

Publishing is idempotent with ``acks=all``. Reading assigns all partitions by hand from offsets that the reader keeps
in its own database; the group's committed offsets serve the usual monitoring tools and decide nothing.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from typing import Any

import structlog
import yaml
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, OffsetOutOfRangeError, TopicAlreadyExistsError, for_code
from aiokafka.partitioner import DefaultPartitioner

from libs.core.envelope import Envelope
from libs.event_log.cloudevents import decode_message, encode
from libs.event_log.port import LogIdentity, Message, OffsetOutOfRange
from libs.process.kafka_security import PLAINTEXT, KafkaSecurity

TOPICS = resources.files(__package__) / "topics.yaml"
BATCH_BYTES_MAX = 1024 * 1024
FETCH_BYTES_MAX = 2 * 1024 * 1024
FETCH_WAIT_MS = 500
REQUEST_MS = 10_000
RETRY_MS = 250
PUBLISH_SECONDS_MAX = 20.0
CLOSE_SECONDS_MAX = 2.0
ANSWER_SECONDS_MAX = 10.0
PROGRESS_SECONDS = 5.0
LAST_MESSAGES = 100

log = structlog.get_logger(__name__)

# While a broker is away the client says so dozens of times a second; relay and consumers say it once per attempt.
logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


class TopicMismatch(Exception):
    """A topic on the broker is not as declared; its partitions must never change."""


@dataclass(frozen=True, slots=True)
class DeclaredTopic:
    """One entry of ``topics.yaml``."""

    name: str
    partitions: int
    replication_factor: int
    config: Mapping[str, str]


def declared_topics() -> list[DeclaredTopic]:
    """The topics that ``topics.yaml`` of this package declares, each entry over the defaults."""
    document = yaml.safe_load(TOPICS.read_text(encoding="utf-8"))
    defaults = document["defaults"]
    topics = []
    for name, own in document["topics"].items():
        merged = {**defaults, **own, "config": {**defaults["config"], **own.get("config", {})}}
        topics.append(DeclaredTopic(name, merged["partitions"], merged["replication_factor"], merged["config"]))
    return topics


async def ensure_topics(
    bootstrap_servers: str,
    topic_prefix: str = "",
    topics: Sequence[DeclaredTopic] = (),
    security: KafkaSecurity = PLAINTEXT,
) -> None:
    """Make the declared topics that are missing, and check the others.

    Args:
        topic_prefix: stands before every name, for several installations on one cluster.
        topics: instead of those of ``topics.yaml``.

    Raises:
        TopicMismatch: a topic has another number of partitions than declared.
        OSError | TimeoutError: the broker can't be reached.
    """
    declared = {topic_prefix + topic.name: topic for topic in topics or declared_topics()}
    with _as_os_errors():
        async with AsyncExitStack() as stack, asyncio.timeout(3 * ANSWER_SECONDS_MAX):
            admin = AIOKafkaAdminClient(
                bootstrap_servers=bootstrap_servers, request_timeout_ms=REQUEST_MS, **security.options()
            )
            stack.push_async_callback(admin.close)
            await admin.start()
            existing = await _partition_counts(admin, declared)
            missing = [_new_topic(name, topic) for name, topic in declared.items() if name not in existing]
            if missing:
                await _create(admin, missing)
                existing = await _existing_after_creation(admin, declared)
    for name, topic in declared.items():
        if existing[name] != topic.partitions:
            raise TopicMismatch(
                f"the topic {name} has {existing[name]} partitions, declared are {topic.partitions}: with another "
                "number the events of one stream would come out of order. Make the topic anew with "
                f"{topic.partitions} partitions and publish its history again."
            )


class KafkaEventLog:
    """The log on a Kafka cluster; the declared topics are made or checked before the first use of one.

    So a service starts while the brokers are away, and nothing relies on brokers that create topics by themselves.

    Args:
        bootstrap_servers: ``host:port``, several separated by commas.
        service: names the reader's group, ``datasync.<service>``, whose lag the usual tools show.
        topic_prefix: stands before every topic's name on the cluster.
        security: how the brokers are reached.
    """

    needs_relay = True

    def __init__(
        self, bootstrap_servers: str, service: str, topic_prefix: str = "", security: KafkaSecurity = PLAINTEXT
    ) -> None:
        self._bootstrap_servers = bootstrap_servers
        self._security = security
        self._service = service
        self._prefix = topic_prefix
        self._producer: AIOKafkaProducer | None = None
        self._partitioner = DefaultPartitioner()
        self._topics_lock = asyncio.Lock()
        self._topics_ensured = False

    async def publish(self, topic: str, envelopes: Sequence[Envelope]) -> None:
        """Publish in order; returns when all are acknowledged by all in-sync replicas.

        Of each partition one batch is under way at a time. With two, the first could expire before it was ever sent
        while the second got through: an event would overtake another.
        """
        await self._ensure_topics()
        try:
            with _as_os_errors():
                async with asyncio.timeout(PUBLISH_SECONDS_MAX):
                    await self._publish(topic, envelopes)
        except BaseException:
            # After a failure the idempotent producer's sequence numbers no longer fit the broker's: it stays stuck.
            await self._close_producer()
            raise

    async def last_position(self, topic: str, store_id: str) -> int:
        """Looks at the last messages of each partition: the very last ones may be repeats."""
        async with self.subscribe(topic, None) as subscription:
            async with asyncio.timeout(3 * ANSWER_SECONDS_MAX):
                messages = await subscription.last_messages(LAST_MESSAGES)
        return max((message.position for message in messages if message.store_id == store_id), default=0)

    @asynccontextmanager
    async def subscribe(self, topic: str, offsets: Mapping[int, int] | None) -> AsyncIterator["KafkaSubscription"]:
        """Read all partitions of a topic from these offsets, their beginnings, or their ends (``offsets=None``)."""
        await self._ensure_topics()
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._bootstrap_servers,
            client_id=f"datasync.{self._service}",
            auto_offset_reset="none",
            request_timeout_ms=REQUEST_MS,
            retry_backoff_ms=RETRY_MS,
            fetch_max_wait_ms=FETCH_WAIT_MS,
            max_partition_fetch_bytes=FETCH_BYTES_MAX,
            **self._security.options(),
        )
        group = f"{self._prefix}datasync.{self._service}"
        progress = _GroupProgress(self._bootstrap_servers, group, self._security)
        try:
            with _as_os_errors():
                async with asyncio.timeout(3 * ANSWER_SECONDS_MAX):
                    await consumer.start()
                    partitions = await _assign(consumer, self._prefix + topic, offsets)
            yield KafkaSubscription(consumer, topic, partitions, progress)
        finally:
            await progress.close()
            await _close(consumer.stop)

    async def identity(self) -> LogIdentity:
        """Asks the brokers."""
        with _as_os_errors():
            async with AsyncExitStack() as stack, asyncio.timeout(3 * ANSWER_SECONDS_MAX):
                admin = AIOKafkaAdminClient(
                    bootstrap_servers=self._bootstrap_servers,
                    request_timeout_ms=REQUEST_MS,
                    **self._security.options(),
                )
                stack.push_async_callback(admin.close)
                await admin.start()
                cluster = await admin.describe_cluster()
        return LogIdentity(kind="kafka", topic_prefix=self._prefix, cluster_id=cluster["cluster_id"] or "")

    async def close(self) -> None:
        """Close the producer; readers close with their subscriptions."""
        await self._close_producer()

    async def _ensure_topics(self) -> None:
        async with self._topics_lock:
            if not self._topics_ensured:
                await ensure_topics(self._bootstrap_servers, self._prefix, security=self._security)
                self._topics_ensured = True

    async def _publish(self, topic: str, envelopes: Sequence[Envelope]) -> None:
        producer = await self._open_producer()
        name = self._prefix + topic
        partitions = sorted(await producer.partitions_for(name))
        if partitions != list(range(len(partitions))):
            raise ConnectionError(f"the broker does not know all partitions of {name} at the moment")
        waiting: dict[int, deque[Envelope]] = {}
        for envelope in envelopes:
            # Murmur2 of the key, positive, modulo the count: what every client's default partitioner does.
            partition = self._partitioner(envelope.stream.encode(), partitions, partitions)
            waiting.setdefault(partition, deque()).append(envelope)
        while waiting:
            sent = [
                await producer.send_batch(_filled_batch(producer, queue), name, partition=partition)
                for partition, queue in waiting.items()
            ]
            await asyncio.gather(*sent)
            waiting = {partition: queue for partition, queue in waiting.items() if queue}

    async def _open_producer(self) -> AIOKafkaProducer:
        if self._producer is None:
            producer = AIOKafkaProducer(
                bootstrap_servers=self._bootstrap_servers,
                client_id=f"datasync.{self._service}",
                acks="all",
                enable_idempotence=True,
                request_timeout_ms=REQUEST_MS,
                max_batch_size=BATCH_BYTES_MAX,
                max_request_size=2 * BATCH_BYTES_MAX,
                **self._security.options(),
            )
            self._producer = producer
            await producer.start()
        return self._producer

    async def _close_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is None:
            return
        await _close(producer.stop)
        # What a stop in good order could not end within its time.
        with suppress(KafkaError, asyncio.CancelledError):
            await producer._sender.close()
        await producer.client.close()


class KafkaSubscription:
    """A reader of all partitions of one topic."""

    def __init__(
        self,
        consumer: AIOKafkaConsumer,
        topic: str,
        partitions: Sequence[TopicPartition],
        progress: "_GroupProgress",
    ) -> None:
        self._consumer = consumer
        self._topic = topic
        self._partitions = list(partitions)
        self._progress = progress
        self._fetched: deque[deque[Any]] = deque()

    async def next_batch(self, messages_max: int, timeout_seconds: float) -> Sequence[Message]:
        """The next messages of one partition; partitions with messages take turns."""
        if not self._fetched:
            await self._fetch(messages_max, timeout_seconds)
        if not self._fetched:
            return []
        records = self._fetched.popleft()
        batch = [self._message(records.popleft()) for _ in range(min(messages_max, len(records)))]
        if records:
            self._fetched.append(records)
        return batch

    async def last_messages(self, count: int) -> list[Message]:
        """Up to ``count`` messages before the end of each partition; reading goes on from there."""
        with _as_os_errors():
            beginnings = await self._consumer.beginning_offsets(self._partitions)
            ends = await self._consumer.end_offsets(self._partitions)
        missing = {partition.partition: ends[partition] for partition in self._partitions}
        for partition in self._partitions:
            self._consumer.seek(partition, max(beginnings[partition], ends[partition] - count))
            if beginnings[partition] == ends[partition]:
                del missing[partition.partition]
        messages: list[Message] = []
        while missing:
            batch = await self.next_batch(count, 1.0)
            messages += batch
            if batch and batch[-1].offset + 1 >= missing.get(batch[-1].partition, 0):
                missing.pop(batch[-1].partition, None)
        return messages

    async def end_offsets(self) -> Mapping[int, int]:
        """The partitions' ends, asked from the broker."""
        with _as_os_errors():
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                ends = await self._consumer.end_offsets(self._partitions)
        return {partition.partition: offset for partition, offset in ends.items()}

    async def report_progress(self, next_offsets: Mapping[int, int]) -> None:
        """Commit the group's offsets, at most every 5 seconds."""
        offsets = {item: next_offsets[item.partition] for item in self._partitions if item.partition in next_offsets}
        self._progress.report(offsets)

    async def _fetch(self, messages_max: int, timeout_seconds: float) -> None:
        try:
            with _as_os_errors():
                records = await self._consumer.getmany(timeout_ms=int(timeout_seconds * 1000), max_records=messages_max)
        except OffsetOutOfRangeError as error:
            raise OffsetOutOfRange(f"{self._topic}: {error}") from error
        self._fetched.extend(deque(items) for items in records.values() if items)

    def _message(self, record: Any) -> Message:
        headers = {key: value.decode(errors="replace") for key, value in record.headers if value is not None}
        return decode_message(self._topic, record.partition, record.offset, headers, record.value or b"")


class _GroupProgress:
    """Commits a group's offsets for the usual monitoring tools, beside the reading and over a client of its own."""

    def __init__(self, bootstrap_servers: str, group: str, security: KafkaSecurity) -> None:
        self._bootstrap_servers = bootstrap_servers
        self._security = security
        self._group = group
        self._consumer: AIOKafkaConsumer | None = None
        self._commit: asyncio.Task[None] | None = None
        self._reported_at = time.monotonic()

    def report(self, offsets: Mapping[TopicPartition, int]) -> None:
        if not offsets or time.monotonic() - self._reported_at < PROGRESS_SECONDS:
            return
        if self._commit is None or self._commit.done():
            self._reported_at = time.monotonic()
            self._commit = asyncio.create_task(self._commit_now(dict(offsets)), name="group-progress")

    async def close(self) -> None:
        if self._commit is not None:
            self._commit.cancel()
            await asyncio.gather(self._commit, return_exceptions=True)
        await self._close_consumer()

    async def _commit_now(self, offsets: dict[TopicPartition, int]) -> None:
        try:
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                consumer = await self._open(list(offsets))
                await consumer.commit(offsets)
        except (KafkaError, OSError, TimeoutError) as error:
            log.info("progress_not_reported", group=self._group, error=type(error).__name__)
            await self._close_consumer()

    async def _close_consumer(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await _close(consumer.stop)

    async def _open(self, partitions: Sequence[TopicPartition]) -> AIOKafkaConsumer:
        if self._consumer is not None and self._consumer.assignment() != set(partitions):
            await self._close_consumer()
        if self._consumer is None:
            self._consumer = AIOKafkaConsumer(
                bootstrap_servers=self._bootstrap_servers,
                group_id=self._group,
                enable_auto_commit=False,
                **self._security.options(),
            )
            self._consumer.assign(list(partitions))
            await self._consumer.start()
        return self._consumer


async def _assign(
    consumer: AIOKafkaConsumer, topic: str, offsets: Mapping[int, int] | None
) -> Sequence[TopicPartition]:
    if topic not in await consumer.topics():
        raise ConnectionError(f"the topic {topic} does not exist")
    # The client learns of a topic's partitions once one of them is assigned.
    consumer.assign([TopicPartition(topic, 0)])
    await consumer.end_offsets([TopicPartition(topic, 0)])
    partitions = [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic))]
    consumer.assign(partitions)
    beginnings = await consumer.beginning_offsets(partitions)
    ends = await consumer.end_offsets(partitions)
    for partition in partitions:
        begin, end = beginnings[partition], ends[partition]
        wanted = end if offsets is None else offsets.get(partition.partition, begin)
        if not begin <= wanted <= end:
            raise OffsetOutOfRange(
                f"{topic}: the next offset of partition {partition.partition} is {wanted}, "
                f"but the log holds {begin} to {end}"
            )
        consumer.seek(partition, wanted)
    return partitions


def _filled_batch(producer: AIOKafkaProducer, queue: "deque[Envelope]") -> Any:
    """A closed batch with as many of the queue's first events as fit; at least one."""
    batch = producer.create_batch()
    while queue:
        envelope = queue[0]
        headers = [(key, value.encode()) for key, value in encode(envelope).items()]
        timestamp_ms = int(envelope.time.timestamp() * 1000)
        if (
            batch.append(
                timestamp=timestamp_ms, key=envelope.stream.encode(), value=envelope.data_json, headers=headers
            )
            is None
        ):
            break
        queue.popleft()
    batch.close()
    return batch


async def _close(stop: Any) -> None:
    try:
        async with asyncio.timeout(CLOSE_SECONDS_MAX):
            await stop()
    except (KafkaError, OSError, TimeoutError) as error:
        log.info("kafka_client_closed_late", error=type(error).__name__)


def _new_topic(name: str, topic: DeclaredTopic) -> NewTopic:
    # The client takes a replication factor of -1 (the broker's default) only beside an assignment, be it an empty one.
    assignments: dict[int, list[int]] | None = {} if topic.replication_factor == -1 else None
    return NewTopic(name, topic.partitions, topic.replication_factor, assignments, dict(topic.config))


async def _create(admin: AIOKafkaAdminClient, topics: Sequence[NewTopic]) -> None:
    response = await admin.create_topics(list(topics), timeout_ms=REQUEST_MS)
    for name, code, *rest in response.topic_errors:
        if code not in (0, TopicAlreadyExistsError.errno):
            raise ConnectionError(
                f"the topic {name} can't be made: {for_code(code).__name__} {rest[0] if rest else ''}"
            )


async def _partition_counts(admin: AIOKafkaAdminClient, names: Mapping[str, Any]) -> dict[str, int]:
    """The number of partitions of those topics that exist."""
    described = await admin.describe_topics(None)
    return {item["topic"]: len(item["partitions"]) for item in described if item["topic"] in names}


async def _existing_after_creation(admin: AIOKafkaAdminClient, names: Mapping[str, Any]) -> dict[str, int]:
    """Creation is acknowledged before every broker has heard of it."""
    while True:
        existing = await _partition_counts(admin, names)
        if len(existing) == len(names):
            return existing
        await asyncio.sleep(0.05)


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Whatever the client says about a broker that it can't work with becomes the port's ``OSError``."""
    try:
        yield
    except OffsetOutOfRangeError:
        raise
    except KafkaError as error:
        raise ConnectionError(f"Kafka: {error}") from error
