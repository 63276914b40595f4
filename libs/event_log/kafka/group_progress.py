"""Commits the offsets of a consumer group for monitoring tools; they decide nothing."""

import asyncio
import time
from collections.abc import Mapping

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from libs.event_log.kafka.client import ANSWER_SECONDS_MAX, Brokers, close_within_limit

PROGRESS_SECONDS = 5.0

log = structlog.get_logger(__name__)


class GroupProgress:
    """The offsets of one group, committed in the background by a client of their own, so that reading never waits."""

    def __init__(self, brokers: Brokers, group: str) -> None:
        self._brokers = brokers
        self._group = group
        self._consumer: AIOKafkaConsumer | None = None
        self._commit: asyncio.Task[None] | None = None
        self._reported_at = time.monotonic()

    def report(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Begin to commit these offsets, unless a commit is in progress or was begun less than 5 seconds ago."""
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

    async def _open(self, partitions: list[TopicPartition]) -> AIOKafkaConsumer:
        if self._consumer is not None and self._consumer.assignment() != set(partitions):
            await self._close_consumer()
        if self._consumer is None:
            self._consumer = AIOKafkaConsumer(group_id=self._group, enable_auto_commit=False, **self._brokers.options())
            self._consumer.assign(partitions)
            await self._consumer.start()
        return self._consumer

    async def _close_consumer(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await close_within_limit(consumer.stop)
