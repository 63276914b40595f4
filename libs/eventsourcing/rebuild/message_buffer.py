"""The messages of one topic that a rebuild has read and not yet applied."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile

from libs.core.envelope import Envelope, UnknownEvent
from libs.event_log.port import Message
from libs.eventsourcing.rebuild import bounds
from libs.eventsourcing.rebuild.report import NEWER_VERSION, RebuildFailed
from libs.eventsourcing.rebuild.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Due:
    """The messages below some offsets: ``events`` are to be applied, ``parked`` were not handled by the service."""

    events: Sequence[Envelope]
    parked: Sequence[Message]
    offsets: Mapping[int, int]


class MessageBuffer:
    """Messages in order, without repetitions and without those of other stores.

    Args:
        store_id: the store whose events count; all do where it is empty.
        is_strict: whether messages that name no store are left out as well.
    """

    def __init__(self, store_id: str, *, is_strict: bool) -> None:
        self._store_id = store_id
        self._is_strict = is_strict
        self._partitions: dict[int, deque[Message]] = {}
        self._highest: dict[int, int] = {}
        # Parked when it was their turn; they are due again once they are no longer parked.
        self._parked: Sequence[Message] = ()
        self.size_bytes = 0

    def __len__(self) -> int:
        return sum(map(len, self._partitions.values()))

    def add(self, messages: Sequence[Message]) -> None:
        for message in messages:
            highest = self._highest.get(message.partition, 0)
            if self._is_foreign(message) or 0 < message.position <= highest:
                continue
            self._highest[message.partition] = max(message.position, highest)
            self._partitions.setdefault(message.partition, deque()).append(message)
            self.size_bytes += _size_bytes(message)

    def due(self, offsets: Mapping[int, int], snapshot: Snapshot) -> Due:
        """The messages that were handled at a moment, in order; the buffer stays as it is.

        Args:
            offsets: below which the messages of each partition were handled.

        Raises:
            RebuildFailed: one of them can't be decoded, or only by a newer version.
        """
        events: list[Envelope] = []
        parked: list[Message] = []
        for message in chain(self._parked, *(self._below(offsets, partition) for partition in self._partitions)):
            if message.id in snapshot.parked:
                parked.append(message)
            elif (event := _event_of(message, snapshot)) is not None:
                events.append(event)
        return Due(events, parked, offsets)

    def remove(self, due: Due) -> None:
        """Forget messages that are applied."""
        self._parked = due.parked
        if sum(map(_size_bytes, due.parked)) > bounds.PARKED_BYTES_MAX:
            raise RebuildFailed(f"too much of {due.parked[0].topic} is parked; `datasync parked --retry` it first")
        for partition, messages in self._partitions.items():
            while messages and messages[0].offset < due.offsets.get(partition, 0):
                self.size_bytes -= _size_bytes(messages.popleft())

    def clear(self) -> dict[int, int]:
        """Forget everything that is not applied; returns the offsets at which it has to be read again."""
        first = {partition: messages[0].offset for partition, messages in self._partitions.items() if messages}
        for partition, messages in self._partitions.items():
            if position := next((message.position for message in messages if message.position > 0), 0):
                self._highest[partition] = position - 1
        self._partitions.clear()
        self.size_bytes = 0
        return first

    def _below(self, offsets: Mapping[int, int], partition: int) -> Iterator[Message]:
        end = offsets.get(partition, 0)
        return takewhile(lambda message: message.offset < end, self._partitions[partition])

    def _is_foreign(self, message: Message) -> bool:
        if not message.store_id:
            return self._is_strict
        return bool(self._store_id) and message.store_id != self._store_id


def _event_of(message: Message, snapshot: Snapshot) -> Envelope | None:
    """The event to apply; None where the service passed it over as unknown."""
    if message.envelope is None:
        raise RebuildFailed(f"{message.topic}: the message {message.id} can't be decoded")
    if not message.envelope.is_understood and message.id not in snapshot.passed_over:
        raise RebuildFailed(f"{message.event_type} {message.event_id}: {NEWER_VERSION}")
    return None if isinstance(message.envelope.data, UnknownEvent) else message.envelope


def _size_bytes(message: Message) -> int:
    return len(message.raw) + bounds.MESSAGE_OVERHEAD_BYTES
