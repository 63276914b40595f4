"""A topic that stands still, with an alarm, until an operator repairs it."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from libs.eventsourcing.consumer import intervals
from libs.eventsourcing.event_store import EventStore
from libs.eventsourcing.offsets import Checkpoints
from libs.eventsourcing.passed_over import TooMuchPassedOver
from libs.eventsourcing.stops import forget_stop, note_stop
from libs.process.telemetry import CONSUMER_STOPPED

log = structlog.get_logger(__name__)


class TopicStop:
    """Whether one topic is stopped, and why."""

    def __init__(self, store: EventStore, topic: str) -> None:
        self._store = store
        self._topic = topic
        self._service = store.database.name.removeprefix("datasync_")
        self._reason: str | None = None

    async def reason(self) -> str | None:
        """Why the topic is stopped and what to do about it; None if it is not."""
        return self._reason

    async def until_repaired(
        self, error: Exception, followed: Checkpoints, stored: Callable[[], Awaitable[Checkpoints]]
    ) -> None:
        """Wait until other checkpoints are stored than those that were followed.

        Those in the database at this moment would not do: if they are the repaired ones, nothing would change any more.
        """
        repair = f"datasync repair {self._service} {self._topic}"
        remedy = "run the newer version" if isinstance(error, TooMuchPassedOver) else f"repair it with `{repair}`"
        await note_stop(self._store, self._topic, str(error))
        self._reason = f"stopped: {error}; {remedy}"
        CONSUMER_STOPPED.labels(self._topic).set(1)
        log.error("consumer_stopped", topic=self._topic, reason=str(error), remedy=remedy)
        while await stored() == followed:  # noqa: ASYNC110 - the change comes from another process
            await asyncio.sleep(intervals.STOPPED_POLL_SECONDS)
        log.info("consumer_repaired", topic=self._topic)
        self.clear()

    def clear(self) -> None:
        """This instance no longer stops."""
        self._reason = None
        CONSUMER_STOPPED.labels(self._topic).set(0)

    async def forget(self) -> None:
        """Messages are handled: a stop that an earlier process noted is over, for example after an upgrade."""
        await forget_stop(self._store, self._topic)
