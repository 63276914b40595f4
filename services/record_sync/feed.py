"""The change feed: a project's events in the order of their positions, without a gap.

Positions are those of the service's whole store, whose every batch raises them in its own transaction, so nothing can
appear behind a reader. Others' events are passed over after they were read; the cursor is the last position that was
examined, not the last that was shown, and so a quiet project's reader does not start over.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from libs.contracts.records import RecordEvent
from libs.core.envelope import Envelope, UnknownEvent
from libs.core.errors import FieldError, InvalidInput, NewerVersion
from libs.runtime.event_store import EventStore
from libs.runtime.head_watcher import HeadWatcher
from libs.runtime.http import Health

EXAMINED_TOGETHER = 500
EXAMINED_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Interest:
    """Whose changes are wanted; None stands for any."""

    project_id: int
    developer_id: str | None = None
    resource_type: str | None = None

    def covers(self, envelope: Envelope) -> bool:
        event = envelope.data
        return (
            envelope.metadata.project_id == self.project_id
            and isinstance(event, RecordEvent)
            and self.developer_id in (None, event.developer_id)
            and self.resource_type in (None, event.resource_type)
        )


@dataclass(frozen=True, slots=True)
class Changes:
    """Some changes.

    Args:
        cursor: the last position that was examined.
        is_all: nothing was committed after the cursor when it was read.
    """

    events: Sequence[Envelope]
    cursor: int
    is_all: bool


class Feed:
    """Reads of the store's events as they come.

    Args:
        store: the service's opened store.
        watcher: watches its head.
        health: readers are let go when the service stops.
    """

    def __init__(self, store: EventStore, watcher: HeadWatcher, health: Health) -> None:
        self._store = store
        self._watcher = watcher
        self._health = health

    @property
    def is_closing(self) -> bool:
        return self._health.stopping

    async def latest(self) -> int:
        """The position of the last committed event."""
        return (await self._store.head()).position

    async def require_known(self, position: int) -> None:
        """Raises ``InvalidInput`` for a position that was not given yet, as after a restored backup."""
        head = self._store.head_cached
        if (head is None or position > head.position) and position > await self.latest():
            message = "is a position that this store has not reached"
            raise InvalidInput(f"after: {message}", errors=[FieldError("after", message, "unknown_position")])

    async def changes(self, after: int, interest: Interest, limit: int) -> Changes:
        """What happened after a position, as far as it can be examined in one go."""
        found: list[Envelope] = []
        start = after
        while after - start < EXAMINED_MAX:
            envelopes = await self._store.read_after(after, EXAMINED_TOGETHER)
            for envelope in envelopes:
                if isinstance(envelope.data, UnknownEvent) and envelope.metadata.project_id == interest.project_id:
                    # An instance of the newer version tells it; passed over here, its reader would never see it.
                    if not found:
                        raise NewerVersion(
                            "a newer version of the service tells what comes next", retry_after_seconds=1
                        )
                    return Changes(found, after, is_all=False)
                after = envelope.position
                if interest.covers(envelope):
                    found.append(envelope)
                    if len(found) == limit:
                        return Changes(found, after, is_all=False)
            if len(envelopes) < EXAMINED_TOGETHER:
                return Changes(found, after, is_all=True)
        return Changes(found, after, is_all=False)

    async def await_changes(self, after: int, interest: Interest, limit: int, timeout_seconds: float) -> Changes:
        """The same, but when there is nothing yet, wait for it; empty when the time is over or the service stops."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        with self._watcher.listen(self._store.database.name) as moved:
            while True:
                moved.clear()
                changes = await self.changes(after, interest, limit)
                left_seconds = deadline - loop.time()
                if changes.events or left_seconds <= 0 or self.is_closing:
                    return changes
                after = changes.cursor
                if changes.is_all:
                    await self._watcher.wait(moved, left_seconds)
