"""The port: what the platform asks of an event log.

The contract, held by ``tests/contract/test_event_log.py`` on every adapter: a topic has partitions; all events of one
stream are in one partition; within a partition the first occurrences stand in position order; an event may come again,
later, and is then recognised by a position that is not above the highest seen.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from libs.core.envelope import Envelope, Frozen


@dataclass(frozen=True, slots=True)
class Message:
    """One message as a consumer gets it.

    Args:
        offset: its place in the partition; the next one to read is ``offset + 1``.
        envelope: the decoded event, or None when it could not be decoded.
        failure: why it could not be decoded; an exception's text.
        position, store_id, stream, event_id, event_type: from the headers, known even when decoding failed.
        raw: the message's value, kept for parking.
        headers: the CloudEvents headers, kept for parking.
    """

    topic: str
    partition: int
    offset: int
    position: int
    store_id: str
    stream: str
    event_id: str
    event_type: str
    envelope: Envelope | None
    failure: str | None
    raw: bytes
    headers: Mapping[str, str]

    @property
    def id(self) -> str:
        """Its place on the log, the id under which it is parked or passed over; topic names contain no slash."""
        return f"{self.topic}/{self.partition}/{self.offset}"


class OffsetOutOfRange(Exception):
    """The stored offset is no longer, or not yet, on the log: never reset silently."""


class Subscription(Protocol):
    """An open reader of one topic."""

    async def next_batch(self, messages_max: int, timeout_seconds: float) -> Sequence[Message]:
        """Up to ``messages_max`` messages of one partition, in order; empty when none came in time.

        Raises:
            OffsetOutOfRange: the log does not hold the asked offset.
            OSError | TimeoutError: the log can't be reached; try again with backoff.
        """

    async def end_offsets(self) -> Mapping[int, int]:
        """For each partition the offset that the next message will get: what lag is measured against."""

    async def report_progress(self, next_offsets: Mapping[int, int]) -> None:
        """Tell the log how far this reader has come, for its monitoring alone; never raises, decides nothing."""


class LogIdentity(Frozen):
    """Tells one log from another.

    Args:
        cluster_id: as the brokers tell it; empty for the embedded log.
    """

    kind: Literal["embedded", "kafka"]
    topic_prefix: str = ""
    cluster_id: str = ""

    def __str__(self) -> str:
        if self.kind == "embedded":
            return "the embedded log"
        prefix = f", topic prefix {self.topic_prefix!r}" if self.topic_prefix else ""
        return f"the Kafka cluster {self.cluster_id}{prefix}"


class EventLog(Protocol):
    """What the platform asks of a log."""

    needs_relay: bool
    """Whether committed events must be published; False where the stores themselves are the log."""

    async def publish(self, topic: str, envelopes: Sequence[Envelope]) -> None:
        """Publish in order and return when all are durable (acks=all).

        Raises:
            OSError | TimeoutError: not all were acknowledged; publish again from the last stored position.
        """

    async def last_position(self, topic: str, store_id: str) -> int:
        """The highest position of a store's events at the topic's end; 0 where it has none there.

        Raises:
            OSError | TimeoutError: the log can't be reached.
        """

    def subscribe(self, topic: str, offsets: Mapping[int, int] | None) -> AbstractAsyncContextManager[Subscription]:
        """Read a topic from ``offsets`` (next offset by partition; a partition not named: its beginning).

        ``offsets=None`` reads from the end: only what comes after the call.
        """

    async def identity(self) -> LogIdentity:
        """Which log this is; raises ``OSError`` while it can't be asked."""
        ...

    async def close(self) -> None:
        """Release every connection."""
