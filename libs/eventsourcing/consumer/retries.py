"""Retries parked messages when an operator asks for it."""

import structlog

from libs.core.decider import PureCodeFailed
from libs.core.errors import FixRequest, NewerVersion
from libs.eventsourcing.consumer.steps import Step, StepPlanner, StepWriter, reason_to_park
from libs.eventsourcing.parking import Failed, Parking, unparking_write

log = structlog.get_logger(__name__)


class Retries:
    """The retries of one topic."""

    def __init__(self, topic: str, parking: Parking, planner: StepPlanner, writer: StepWriter) -> None:
        self._topic = topic
        self._parking = parking
        self._planner = planner
        self._writer = writer

    async def run(self) -> None:
        """Retry the streams that an operator wants retried."""
        for stream in await self._parking.streams_to_retry():
            await self._retry(stream)

    async def _retry(self, stream: str) -> None:
        """Handle the parked messages of a stream in order, up to the first that fails again."""
        async for message in self._parking.messages_of(stream):
            step = Step(self._writer.checkpoint(message.partition), side_writes=[unparking_write(message)])
            try:
                self._planner.plan_message(step, message)
                await self._writer.write(message.partition, step)
            except (PureCodeFailed, FixRequest, NewerVersion) as error:
                await self._parking.failed_again(Failed(message, reason_to_park(error)))
                return
            log.info("parked_message_handled", topic=self._topic, stream=stream, parked=message.id)
        await self._parking.load()
