"""The contract of the event log, which both adapters fulfil: the embedded one and Kafka."""

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime
from typing import Protocol

import pytest

from libs.contracts.catalog import TOPIC, SourceCreated, SourceDeleted
from libs.contracts.jobs import JobActivated, JobCreated
from libs.contracts.runs import TOPIC as RUNS
from libs.contracts.runs import RunQueued
from libs.contracts.topics import OWNERS
from libs.core.envelope import EVENT_SIZE_BYTES_MAX, Envelope, Event, Metadata
from libs.core.ids import uuid7
from libs.event_log.embedded import EmbeddedEventLog
from libs.event_log.kafka import Brokers, KafkaEventLog, ensure_topics
from libs.event_log.port import EventLog, Message, OffsetOutOfRange, Subscription
from libs.eventsourcing.batch import Batch
from libs.eventsourcing.event_store import EventStore
from libs.mongodb.client import connect

NOW = datetime(2026, 2, 21, 10, 30, 0, 123_000, tzinfo=UTC)
METADATA = Metadata("Zoë", 123, "request-1", uuid7(), "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
SOURCE = SourceCreated(name="café", type="postgres", version="v0.1.0", config_json='{"port": 5432.0}')


class Log(Protocol):
    """A log under test and a way to put events on it."""

    @property
    def log(self) -> EventLog: ...

    async def emit(self, *events: tuple[str, Event], metadata: Metadata = METADATA) -> list[Envelope]: ...

    async def emit_undecodable(self, stream: str) -> None: ...


def envelope_of(stream: str, event: Event, metadata: Metadata = METADATA, position: int = 0) -> Envelope:
    data_json = event.model_dump_json().encode()
    return Envelope(uuid7(), stream, 1, position, "", NOW, event, data_json, metadata, event.SCHEMA_VERSION)


class EmbeddedLog:
    """Events are appended to their owner's store."""

    def __init__(self, url: str, database_prefix: str) -> None:
        self.client = connect(url)
        self.prefix = database_prefix
        self.log = EmbeddedEventLog(self.client, database_prefix)
        self._stores: dict[str, EventStore] = {}
        self._versions: dict[str, itertools.count[int]] = {}

    async def store(self, topic: str) -> EventStore:
        owner = OWNERS[topic]
        if owner not in self._stores:
            self._stores[owner] = EventStore(self.client, self.prefix + owner)
            await self._stores[owner].open((), {})
        return self._stores[owner]

    async def emit(self, *events: tuple[str, Event], metadata: Metadata = METADATA) -> list[Envelope]:
        store = await self.store(events[0][1].TOPIC)
        head = await store.head()
        envelopes = [
            replace(
                envelope_of(stream, event, metadata),
                version=next(self._versions.setdefault(stream, itertools.count(1))),
                store_id=head.store_id,
            )
            for stream, event in events
        ]
        position = await asyncio.to_thread(store.writer.commit, Batch(head.collections, events=envelopes))
        return [replace(item, position=number) for number, item in enumerate(envelopes, position + 1)]

    async def emit_undecodable(self, stream: str) -> None:
        (envelope,) = await self.emit((stream, SOURCE))
        store = await self.store(TOPIC)
        await store.database["events"].update_one({"_id": envelope.id}, {"$set": {"data": '{"name": 1}'}})


class KafkaLog:
    """Events are published as the relay does it."""

    def __init__(self, bootstrap_servers: str) -> None:
        self.bootstrap_servers = bootstrap_servers
        self.prefix = f"{uuid.uuid4().hex[:8]}."
        self.log = KafkaEventLog(bootstrap_servers, "test", self.prefix)
        self._positions = itertools.count(1)
        self._versions: dict[str, itertools.count[int]] = {}

    async def emit(self, *events: tuple[str, Event], metadata: Metadata = METADATA) -> list[Envelope]:
        envelopes = [
            replace(
                envelope_of(stream, event, metadata, next(self._positions)),
                version=next(self._versions.setdefault(stream, itertools.count(1))),
                store_id="store-1",
            )
            for stream, event in events
        ]
        await self.log.publish(events[0][1].TOPIC, envelopes)
        return envelopes

    async def emit_undecodable(self, stream: str) -> None:
        envelope = replace(envelope_of(stream, SOURCE, position=next(self._positions)), store_id="store-1")
        await self.log.publish(TOPIC, [replace(envelope, data_json=b'{"name": 1}')])


@pytest.fixture
async def subject(
    event_log_kind: str, request: pytest.FixtureRequest, mongod: str, database_prefix: str
) -> AsyncIterator[Log]:
    async with AsyncExitStack() as stack:
        subject: EmbeddedLog | KafkaLog
        if event_log_kind == "embedded":
            subject = EmbeddedLog(mongod, database_prefix)
            await subject.store(TOPIC)
            stack.callback(subject.client.close)
        else:
            bootstrap_servers = request.getfixturevalue("kafka")
            subject = KafkaLog(bootstrap_servers)
            await ensure_topics(Brokers(bootstrap_servers), subject.prefix)
        stack.push_async_callback(subject.log.close)
        yield subject


async def read(
    subscription: Subscription, count: int, messages_max: int = 400, timeout_seconds: float = 5
) -> list[Message]:
    """``count`` messages, whatever the batches."""
    messages: list[Message] = []
    async with asyncio.timeout(20):
        while len(messages) < count:
            messages += await subscription.next_batch(messages_max, timeout_seconds)
    return messages


def by_position(messages: Sequence[Message]) -> list[Envelope]:
    return sorted((message.envelope for message in messages if message.envelope), key=lambda item: item.position)


async def test_an_event_comes_back_as_it_went(subject: Log) -> None:
    sent = await subject.emit(("source-1", SOURCE))
    sent += await subject.emit(("source-1", SourceDeleted()), metadata=Metadata())
    async with subject.log.subscribe(TOPIC, {}) as subscription:
        messages = await read(subscription, 2)
    assert [message.envelope for message in messages] == sent
    first = messages[0]
    assert first.failure is None
    assert (first.position, first.store_id, first.stream) == (sent[0].position, sent[0].store_id, "source-1")
    assert first.raw == sent[0].data_json
    assert first.headers["ce_type"] == "datasync.catalog.source_created.v1"
    assert first.headers["ce_source"] == "/datasync/catalog"
    assert "ce_projectid" not in messages[1].headers


async def test_a_stream_is_in_one_partition_and_positions_rise_in_each(subject: Log) -> None:
    sent = await subject.emit(*[(f"source-{number % 40}", SOURCE) for number in range(400)])
    async with subject.log.subscribe(TOPIC, {}) as subscription:
        messages = await read(subscription, 400)
    assert by_position(messages) == sent
    partitions: dict[str, set[int]] = {}
    for message in messages:
        partitions.setdefault(message.stream, set()).add(message.partition)
    assert all(len(found) == 1 for found in partitions.values())
    for partition in {message.partition for message in messages}:
        positions = [message.position for message in messages if message.partition == partition]
        assert positions == sorted(positions)


async def test_a_batch_is_of_one_partition_and_no_longer_than_requested(subject: Log) -> None:
    await subject.emit(*[(f"source-{number}", SOURCE) for number in range(50)])
    seen = 0
    async with subject.log.subscribe(TOPIC, {}) as subscription:
        while seen < 50:
            batch = await subscription.next_batch(7, 5)
            assert 0 < len(batch) <= 7
            assert len({message.partition for message in batch}) == 1
            seen += len(batch)


async def test_reading_goes_on_from_the_stored_offset(subject: Log) -> None:
    sent = await subject.emit(*[("source-1", SOURCE) for _ in range(5)])
    async with subject.log.subscribe(TOPIC, {}) as subscription:
        first = (await read(subscription, 2, messages_max=2))[-1]
    async with subject.log.subscribe(TOPIC, {first.partition: first.offset + 1}) as subscription:
        rest = await read(subscription, 3)
    assert [message.envelope for message in rest] == sent[2:]


async def test_from_the_end_only_what_comes_later_is_read(subject: Log) -> None:
    await subject.emit(("source-1", SOURCE))
    async with subject.log.subscribe(TOPIC, None) as subscription:
        assert await subscription.next_batch(10, 0.3) == []
        sent = await subject.emit(("source-1", SourceDeleted()))
        assert by_position(await read(subscription, 1)) == sent


async def test_a_waiting_reader_wakes_when_an_event_comes(subject: Log) -> None:
    async with subject.log.subscribe(TOPIC, {}) as subscription:
        await subject.emit(("source-1", SOURCE))
        await read(subscription, 1)
        reading = asyncio.ensure_future(read(subscription, 1, timeout_seconds=60))
        await asyncio.sleep(0)
        sent = await subject.emit(("source-1", SourceDeleted()))
        assert by_position(await reading) == sent


async def test_an_event_that_comes_again_is_known_by_its_position(subject: Log) -> None:
    sent = await subject.emit(*[("source-1", SOURCE) for _ in range(3)])
    await subject.log.publish(TOPIC, sent[1:])
    last = await subject.emit(("source-1", SourceDeleted()))
    total = 6 if subject.log.needs_relay else 4
    async with subject.log.subscribe(TOPIC, {}) as subscription:
        messages = await read(subscription, total)
    highest, first_occurrences = 0, []
    for message in messages:
        if message.position > highest:
            highest = message.position
            first_occurrences.append(message.envelope)
    assert first_occurrences == [*sent, *last]


async def test_an_offset_beyond_the_end_is_never_reset(subject: Log) -> None:
    await subject.emit(("source-1", SOURCE))
    async with subject.log.subscribe(TOPIC, {}) as subscription:
        ends = await subscription.end_offsets()
    with pytest.raises(OffsetOutOfRange):
        async with subject.log.subscribe(TOPIC, {item: end + 5 for item, end in ends.items()}) as subscription:
            await subscription.next_batch(1, 1)


async def test_the_end_offset_is_that_of_the_next_message(subject: Log) -> None:
    await subject.emit(*[("source-1", SOURCE) for _ in range(3)])
    async with subject.log.subscribe(TOPIC, {}) as subscription:
        last = (await read(subscription, 3))[-1]
        assert (await subscription.end_offsets())[last.partition] == last.offset + 1


async def test_the_last_position_is_that_of_the_stores_newest_event(subject: Log) -> None:
    assert await subject.log.last_position(TOPIC, "store-1") == 0
    sent = await subject.emit(*[(f"source-{number}", SOURCE) for number in range(30)])
    await subject.log.publish(TOPIC, sent[:3])
    assert await subject.log.last_position(TOPIC, sent[0].store_id) == sent[-1].position
    assert await subject.log.last_position(TOPIC, "another") == 0


@pytest.mark.parametrize("character", ["x", '"'])
async def test_an_event_of_the_largest_size_gets_through(subject: Log, character: str) -> None:
    """Also where every character of its text is escaped."""
    event = SOURCE.model_copy(update={"config_json": character * (EVENT_SIZE_BYTES_MAX - 200)})
    sent = await subject.emit(("source-1", event), ("source-1", event), ("source-1", SOURCE))
    async with subject.log.subscribe(TOPIC, {}) as subscription:
        assert by_position(await read(subscription, 3)) == sent


async def test_what_cannot_be_decoded_is_handed_on_with_its_failure(subject: Log) -> None:
    await subject.emit_undecodable("source-7")
    after = await subject.emit(("source-7", SourceDeleted()))
    async with subject.log.subscribe(TOPIC, {}) as subscription:
        broken, whole = await read(subscription, 2)
    assert broken.envelope is None
    assert broken.failure
    assert broken.raw
    assert (broken.stream, broken.position) == ("source-7", after[0].position - 1)
    assert whole.envelope == after[0]


async def test_a_topic_carries_only_its_own_events(subject: Log) -> None:
    """Jobs and runs have one owner, and positions of one store."""
    job = JobCreated(
        name="nightly",
        source_id=1,
        destination_id=2,
        frequency="",
        streams_config_json="{}",
        advanced_settings_json="null",
        activate=True,
    )
    await subject.emit(("job-1", job))
    run = await subject.emit(("run-1", RunQueued(job_id=1, kind="sync", trigger="manual")))
    await subject.emit(("job-1", JobActivated()))
    async with subject.log.subscribe(RUNS, {}) as subscription:
        assert by_position(await read(subscription, 1)) == run
        assert await subscription.next_batch(10, 0.3) == []


@pytest.mark.parametrize("stop_after", [1, 3])
async def test_two_readers_do_not_disturb_each_other(subject: Log, stop_after: int) -> None:
    sent = await subject.emit(*[("source-1", SOURCE) for _ in range(4)])
    async with subject.log.subscribe(TOPIC, {}) as one, subject.log.subscribe(TOPIC, {}) as other:
        await read(one, stop_after, messages_max=stop_after)
        assert by_position(await read(other, 4)) == sent
