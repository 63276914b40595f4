"""Folds another service's events, from one topic of the log, into the shadows of the projections that follow it."""

import asyncio
from collections.abc import Mapping, Sequence

from libs.core.decider import Projection
from libs.event_log.port import EventLog
from libs.eventsourcing.event_store import EventStore
from libs.eventsourcing.offsets import Checkpoints, store_id_of
from libs.eventsourcing.rebuild import bounds
from libs.eventsourcing.rebuild.message_buffer import MessageBuffer
from libs.eventsourcing.rebuild.shadow_writer import ShadowWriter
from libs.eventsourcing.rebuild.shadows import Shadows
from libs.eventsourcing.rebuild.snapshot import Snapshot
from libs.eventsourcing.rebuild.topic_reader import TopicReader
from libs.mongodb.client import ClientSession


class ForeignEvents:
    """The events of one topic, up to what the service has handled.

    Args:
        topic: the topic.
        projections: those that follow it.
        stored: the checkpoints at the beginning of the rebuild, which name the store whose events count.
        replaced_by: for a topic under repair, the checkpoints that count instead of the stored ones.
        buffer_bytes_max: how much is read before it has to be applied.
    """

    def __init__(
        self,
        store: EventStore,
        event_log: EventLog,
        shadows: Shadows,
        topic: str,
        projections: Sequence[Projection],
        stored: Checkpoints,
        replaced_by: Checkpoints | None,
        buffer_bytes_max: int,
    ) -> None:
        self._store = store
        self._shadows = shadows
        self._topic = topic
        self._projections = projections
        self._replaced_by = replaced_by
        self._buffer_bytes_max = buffer_bytes_max
        self.reader = TopicReader(event_log, topic)
        self._buffer = MessageBuffer(
            store_id_of(stored if replaced_by is None else replaced_by), is_strict=replaced_by is not None
        )

    def has_read(self, snapshot: Snapshot) -> bool:
        """Whether ``fold`` to the snapshot can do without the log."""
        return self.reader.has_reached(self._targets(snapshot))

    async def reach(self, snapshot: Snapshot) -> None:
        """Read and fold what was handled at the snapshot, in portions that fit into memory."""
        async for batch in self.reader.batches(self._targets(snapshot)):
            self._buffer.add(batch)
            if self._buffer.size_bytes >= self._buffer_bytes_max:
                await asyncio.to_thread(self.fold, snapshot)
                if self._buffer.size_bytes >= self._buffer_bytes_max / 2:
                    # Most of it is ahead of the snapshot, and would leave no room for what is still to be read.
                    await self.reader.seek(self.reader.next_offsets | self._buffer.clear())
        await asyncio.to_thread(self.fold, snapshot)

    def fold(self, snapshot: Snapshot, session: ClientSession | None = None) -> None:
        """Fold what was read and was handled at the snapshot. It blocks.

        Args:
            session: a transaction, which may be aborted and run again: then the messages stay in the buffer.
        """
        due = self._buffer.due(self._targets(snapshot), snapshot)
        for start in range(0, len(due.events), bounds.EVENTS_TOGETHER):
            together = due.events[start : start + bounds.EVENTS_TOGETHER]
            ShadowWriter(self._store, self._shadows, session).project(self._projections, together)
        if session is None:
            self._buffer.remove(due)

    def _targets(self, snapshot: Snapshot) -> Mapping[int, int]:
        checkpoints = snapshot.checkpoints.get(self._topic, {}) if self._replaced_by is None else self._replaced_by
        return {partition: checkpoint.offset for partition, checkpoint in checkpoints.items()}
