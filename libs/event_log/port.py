"""The port of the event log.

The contract, which ``tests/contract/test_event_log.py`` checks for every adapter: a topic has partitions; all events of
a stream are in one partition; within a partition the first occurrences of events are in the order of their positions.
An event may occur again later; then its position is not above the highest one before it.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from libs.core.envelope import Envelope, Frozen


@dataclass(frozen=True, slots=True)
class Message:
    """One message, as a consumer gets it.

    Args:
        offset: its offset in the partition; the next one to read is ``offset + 1``.
        position, store_id, stream, event_id, event_type: from the headers, so known even if decoding failed.
        envelope: the decoded event; None if it could not be decoded.
        failure: why it could not be decoded.
        raw: the value.
        headers: the CloudEvents headers.
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
        """Its topic, partition and offset, which identify it; the names of topics contain no slash."""
        return f"{self.topic}/{self.partition}/{self.offset}"


class OffsetOutOfRange(Exception):
    """The log no longer holds the offset, or does not hold it yet. Offsets are never reset silently."""


class Subscription(Protocol):
    """An open reader of one topic."""

    async def next_batch(self, messages_max: int, timeout_seconds: float) -> Sequence[Message]:
        """Up to ``messages_max`` messages of one partition, in order; empty if none arrived in time.

        Raises:
            OffsetOutOfRange: the log does not hold the next offset.
            OSError | TimeoutError: the log can't be reached; retry with backoff.
        """

    async def end_offsets(self) -> Mapping[int, int]:
        """The offset that the next message of each partition will get."""

    async def report_progress(self, next_offsets: Mapping[int, int]) -> None:
        """Show monitoring tools how far this reader has come; never raises, and decides nothing."""


class LogIdentity(Frozen):
    """Identifies a log.

    Args:
        cluster_id: the Kafka cluster's; empty for the embedded log.
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
    """An event log."""

    needs_relay: bool
    """Whether committed events have to be published; False if the stores themselves are the log."""

    async def publish(self, topic: str, envelopes: Sequence[Envelope]) -> None:
        """Publish in order; returns when all events are durable.

        Raises:
            OSError | TimeoutError: not all were acknowledged; publish them again.
        """

    async def last_position(self, topic: str, store_id: str) -> int:
        """The position of the last event of a store in a topic; 0 if there is none.

        Raises:
            OSError | TimeoutError: the log can't be reached.
        """

    def subscribe(self, topic: str, offsets: Mapping[int, int] | None) -> AbstractAsyncContextManager[Subscription]:
        """Read a topic.

        Args:
            offsets: the next offset by partition; a partition that is not named is read from its beginning. None reads
                only what is published after the call.
        """

    async def identity(self) -> LogIdentity:
        """Which log this is; raises ``OSError`` if it can't be reached."""
        ...

    async def close(self) -> None:
        """Release every connection."""
