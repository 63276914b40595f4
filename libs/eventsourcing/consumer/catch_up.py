"""After an upgrade: handles the messages that an earlier version passed over.

First the owed reactions happen, of each stream in order. Then the projections are rebuilt from the log, so that they
contain what the earlier version did not understand. Only then are the messages removed.
"""

import time
from collections.abc import Awaitable, Callable

import structlog

from libs.core.decider import PureCodeFailed
from libs.core.errors import FixRequest, NewerVersion
from libs.event_log.port import Message
from libs.eventsourcing.consumer import intervals
from libs.eventsourcing.consumer.steps import Step, StepPlanner, StepWriter, reason_to_park
from libs.eventsourcing.parking import BEHIND_PARKED, Failed, Parking
from libs.eventsourcing.passed_over import PassedOver, PassedOverMessage, forgetting_write, passing_over_write

log = structlog.get_logger(__name__)


class CatchUp:
    """Catches up on one topic.

    Args:
        refold: rebuilds the service's projections from the log; False if it could not. None if there are none.
    """

    def __init__(
        self,
        topic: str,
        parking: Parking,
        passed_over: PassedOver,
        planner: StepPlanner,
        writer: StepWriter,
        refold: Callable[[], Awaitable[bool]] | None,
    ) -> None:
        self._topic = topic
        self._parking = parking
        self._passed_over = passed_over
        self._planner = planner
        self._writer = writer
        self._refold = refold
        self._is_wanted = False
        self._next_at = 0.0

    def request(self) -> None:
        """A message was passed over that this version understands: it may be handled once its entity can be changed."""
        self._is_wanted = True

    @property
    def is_due(self) -> bool:
        """What this version does not understand is not tried again before another version runs."""
        return self._is_wanted and time.monotonic() >= self._next_at

    async def run(self) -> None:
        """Handle the messages, of each stream up to the first that can't be handled yet."""
        self._next_at = time.monotonic() + intervals.CATCH_UP_SECONDS
        self._is_wanted = False
        blocked_streams: set[str] = set()
        handled: list[str] = []
        async for item in self._passed_over.messages():
            if item.message.stream in blocked_streams:
                continue
            if item.is_understood and await self._react(item):
                handled.append(item.message.id)
            else:
                blocked_streams.add(item.message.stream)
                self._is_wanted |= item.is_understood
        if handled and self._refold is not None and not await self._refold():
            self._is_wanted = True
        elif handled:
            await self._passed_over.remove(handled)
            log.info("passed_over_messages_handled", topic=self._topic, messages=len(handled))
        await self._passed_over.load()

    async def _react(self, item: PassedOverMessage) -> bool:
        """Cause the reactions that a message owes; False while they concern an entity that a newer version changed."""
        if not item.owes_reactions:
            return True
        if self._parking.holds(item.message.stream):
            await self._park(item.message, BEHIND_PARKED)
            return True
        try:
            await self._write_reactions(item.message)
        except NewerVersion:
            return False
        except (PureCodeFailed, FixRequest) as error:
            await self._park(item.message, reason_to_park(error))
        return True

    async def _write_reactions(self, message: Message) -> None:
        step = Step(self._writer.checkpoint(message.partition))
        step.acts += self._planner.plan_event(step, message)
        # The projections are rebuilt afterwards, in the order of the log.
        step.projections.clear()
        step.side_writes.append(passing_over_write(PassedOverMessage(message, owes_reactions=False)))
        await self._writer.write(message.partition, step)

    async def _park(self, message: Message, reason: str) -> None:
        step = Step(self._writer.checkpoint(message.partition))
        step.parked.append(Failed(message, reason))
        step.side_writes.append(forgetting_write(message))
        await self._writer.write(message.partition, step)
