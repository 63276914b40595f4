"""Reads all partitions of a topic, assigned by hand, from offsets that the reader keeps."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import OffsetOutOfRangeError

from libs.event_log.cloudevents import decode_message
from libs.event_log.kafka.client import (
    ANSWER_SECONDS_MAX,
    OPEN_SECONDS_MAX,
    REQUEST_MS,
    Brokers,
    as_os_errors,
    close_within_limit,
)
from libs.event_log.kafka.group_progress import GroupProgress
from libs.event_log.port import Message, OffsetOutOfRange

FETCH_BYTES_MAX = 2 * 1024 * 1024
FETCH_WAIT_MS = 500
RETRY_MS = 250


@asynccontextmanager
async def subscription_to(
    topic: str, offsets: Mapping[int, int] | None, brokers: Brokers, client_id: str, prefix: str
) -> AsyncIterator["KafkaSubscription"]:
    """Read a topic.

    Args:
        topic: its name, without the prefix that it has on the cluster.
        offsets: the next offset by partition, the beginning of those that are not named; None for the ends.
        client_id: names the client in the brokers' logs and metrics, and after the prefix the consumer group whose
            offsets show the progress to monitoring tools.
        prefix: precedes the names of topics and groups on the cluster.
    """
    consumer = AIOKafkaConsumer(
        client_id=client_id,
        auto_offset_reset="none",
        request_timeout_ms=REQUEST_MS,
        retry_backoff_ms=RETRY_MS,
        fetch_max_wait_ms=FETCH_WAIT_MS,
        max_partition_fetch_bytes=FETCH_BYTES_MAX,
        **brokers.options(),
    )
    progress = GroupProgress(brokers, prefix + client_id)
    try:
        with as_os_errors():
            async with asyncio.timeout(OPEN_SECONDS_MAX):
                await consumer.start()
                partitions = await _assign(consumer, prefix + topic, offsets)
        yield KafkaSubscription(consumer, topic, partitions, progress)
    finally:
        await progress.close()
        await close_within_limit(consumer.stop)


class KafkaSubscription:
    """A reader of all partitions of one topic."""

    def __init__(
        self, consumer: AIOKafkaConsumer, topic: str, partitions: Sequence[TopicPartition], progress: GroupProgress
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
        """Up to ``count`` messages before the end of each partition; reading continues at the ends."""
        with as_os_errors():
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
        """The end of each partition, as the brokers have it now."""
        with as_os_errors():
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                ends = await self._consumer.end_offsets(self._partitions)
        return {partition.partition: offset for partition, offset in ends.items()}

    async def report_progress(self, next_offsets: Mapping[int, int]) -> None:
        """Commit the group's offsets, at most every 5 seconds."""
        self._progress.report(
            {item: next_offsets[item.partition] for item in self._partitions if item.partition in next_offsets}
        )

    async def _fetch(self, messages_max: int, timeout_seconds: float) -> None:
        try:
            with as_os_errors():
                records = await self._consumer.getmany(timeout_ms=int(timeout_seconds * 1000), max_records=messages_max)
        except OffsetOutOfRangeError as error:
            raise OffsetOutOfRange(f"{self._topic}: {error}") from error
        self._fetched.extend(deque(items) for items in records.values() if items)

    def _message(self, record: Any) -> Message:
        headers = {key: value.decode(errors="replace") for key, value in record.headers if value is not None}
        return decode_message(self._topic, record.partition, record.offset, headers, record.value or b"")


async def _assign(
    consumer: AIOKafkaConsumer, topic: str, offsets: Mapping[int, int] | None
) -> Sequence[TopicPartition]:
    """Assign all partitions of the topic and seek to the offsets, which the log must hold."""
    if topic not in await consumer.topics():
        raise ConnectionError(f"the topic {topic} does not exist")
    # The client knows the partitions of a topic only after one of them was assigned.
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
