"""Reads one topic from its beginning up to given offsets."""

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack

from libs.event_log.port import EventLog, Message, OffsetOutOfRange, Subscription
from libs.eventsourcing.rebuild import bounds
from libs.eventsourcing.rebuild.report import RebuildFailed

WAIT_SECONDS = 1.0
STALLED_SECONDS_MAX = 60.0
EMPTY_READS_MAX = 3


class TopicReader:
    """A reader of one topic.

    ``next_offsets`` are those to read next, by partition; a partition that is not named is at its beginning.
    """

    def __init__(self, event_log: EventLog, topic: str) -> None:
        self._event_log = event_log
        self._topic = topic
        self._stack = AsyncExitStack()
        self._subscription: Subscription
        self._empty_reads = 0
        self.next_offsets: dict[int, int] = {}

    async def __aenter__(self) -> "TopicReader":
        await self.seek({})
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def seek(self, offsets: Mapping[int, int]) -> None:
        """Go on reading from these offsets."""
        await self._stack.aclose()
        self.next_offsets = dict(offsets)
        try:
            self._subscription = await self._stack.enter_async_context(self._event_log.subscribe(self._topic, offsets))
        except OffsetOutOfRange as error:
            raise RebuildFailed(f"{self._topic} expires faster than it can be read: {error}") from error

    async def end_offsets(self) -> dict[int, int]:
        """The ends of the partitions that ever had a message."""
        return {partition: end for partition, end in (await self._subscription.end_offsets()).items() if end > 0}

    def has_reached(self, targets: Mapping[int, int]) -> bool:
        return all(self.next_offsets.get(partition, 0) >= offset for partition, offset in targets.items())

    async def batches(self, targets: Mapping[int, int]) -> AsyncIterator[Sequence[Message]]:
        """Batches until everything below the targets is read; some messages from above them come, too.

        Raises:
            RebuildFailed: the topic ends before the targets, or nothing came for a minute.
        """
        advanced_at = time.monotonic()
        while not self.has_reached(targets):
            batch = await self._subscription.next_batch(bounds.EVENTS_TOGETHER, WAIT_SECONDS)
            if batch:
                partition, received_at = batch[0].partition, time.monotonic()
                if batch[0].offset < targets.get(partition, 0):
                    advanced_at = received_at
                self.next_offsets[partition] = batch[-1].offset + 1
                yield batch
                # The time that the caller took does not count.
                advanced_at += time.monotonic() - received_at
            else:
                await self._pass_expired(targets)
            if time.monotonic() - advanced_at > STALLED_SECONDS_MAX:
                raise RebuildFailed(f"{self._topic} can't be read up to the stored offsets")

    async def _pass_expired(self, targets: Mapping[int, int]) -> None:
        """Count partitions as read whose messages have all expired: nothing comes although the target is their end."""
        ends = await self._subscription.end_offsets()
        if any(offset > ends.get(partition, 0) for partition, offset in targets.items()):
            raise RebuildFailed(f"{self._topic} ends before the stored offsets; `datasync repair` it first")
        self._empty_reads += 1
        if self._empty_reads >= EMPTY_READS_MAX:
            for partition, offset in targets.items():
                if offset == ends[partition]:
                    self.next_offsets.setdefault(partition, offset)
