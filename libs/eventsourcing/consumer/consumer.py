"""Follows one topic: every event updates the projections and causes its reactions exactly once.

The checkpoint of each partition is in the consumer's own database, and moves in the transaction that writes what the
messages caused. After any failure the consumer begins again at the stored checkpoints. A message that comes again is
recognised by its position, which is not above the highest one handled in its partition.

Messages that fail are parked, and messages that only a newer version understands are passed over, each with what has to
wait behind it in its stream. If that does not help, the topic stops with an alarm.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from libs.core.clock import Clock, SystemClock
from libs.core.decider import Projection, PureCodeFailed, Reaction
from libs.core.errors import FixRequest, NewerVersion, RetryLater
from libs.event_log.port import EventLog, Message, OffsetOutOfRange, Subscription
from libs.eventsourcing.backoff import Backoff
from libs.eventsourcing.batch import OffsetMoved
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.consumer import intervals
from libs.eventsourcing.consumer.catch_up import CatchUp
from libs.eventsourcing.consumer.retries import Retries
from libs.eventsourcing.consumer.steps import Step, StepPlanner, StepWriter, raise_if_transient, reason_to_park
from libs.eventsourcing.consumer.topic_stop import TopicStop
from libs.eventsourcing.event_store import EventStore
from libs.eventsourcing.offsets import Checkpoints, store_id_of, stored_checkpoints
from libs.eventsourcing.parking import Parking, TooMuchParked
from libs.eventsourcing.passed_over import PassedOver, TooMuchPassedOver
from libs.mongodb.client import PyMongoError
from libs.process.health import Health
from libs.process.telemetry import CONSUMER_LAG_MESSAGES, CONSUMER_LAG_SECONDS

MESSAGES_MAX = 400
GATHERED_BYTES_MAX = 8 * 1024 * 1024


class StoreReplaced(Exception):
    """The messages come from another store than before: its owner's database was restored or replaced."""


class Consumer:
    """A service's consumer of one topic.

    Args:
        topic: the topic to follow.
        event_log: the log that has it.
        store, commands: the service's own; everything is written through them.
        health: gets a check that fails while the topic is stopped.
        projections, reactions: those of the service that follow the topic.
        refold: rebuilds the service's projections from the log; False if it could not.
    """

    def __init__(
        self,
        *,
        topic: str,
        event_log: EventLog,
        store: EventStore,
        commands: CommandHandler,
        health: Health,
        projections: Sequence[Projection] = (),
        reactions: Sequence[Reaction] = (),
        refold: Callable[[], Awaitable[bool]] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._topic = topic
        self._event_log = event_log
        self._store = store
        self._clock = clock or SystemClock()
        self._parking = Parking(store.database, topic)
        passed_over = PassedOver(store.database, topic)
        self._planner = StepPlanner(projections, reactions, self._parking, passed_over)
        self._writer = StepWriter(topic, commands, self._parking, passed_over, self._clock)
        self._retries = Retries(topic, self._parking, self._planner, self._writer)
        self._catch_up = CatchUp(topic, self._parking, passed_over, self._planner, self._writer, refold)
        self._stop = TopicStop(store, topic)
        self._backoff = Backoff("consumer_waits", intervals.BACKOFF_SECONDS_MAX)
        self._retry_at = 0.0
        self._measure_lag_at = 0.0
        health.add(f"consumer {topic}", self._stop.reason)

    async def run(self) -> None:
        """Follow the topic until cancelled; one instance at a time, under the topic's lease."""
        try:
            while True:
                try:
                    await self._follow()
                except (OffsetOutOfRange, StoreReplaced, TooMuchParked, TooMuchPassedOver) as error:
                    await self._stop.until_repaired(error, dict(self._writer.checkpoints), self._stored_checkpoints)
                    self._parking.forgive()
                except (OSError, PyMongoError, RetryLater, OffsetMoved) as error:
                    await self._backoff.wait(error, topic=self._topic)
        finally:
            self._stop.clear()

    async def _follow(self) -> None:
        self._writer.checkpoints = await stored_checkpoints(self._store, self._topic)
        await self._parking.load()
        await self._catch_up.run()
        begun = {partition: offset for partition, offset in self._next_offsets().items() if offset > 0}
        async with self._event_log.subscribe(self._topic, begun) as subscription:
            await self._follow_on(subscription)
            await self._stop.forget()
            while True:
                await self._follow_on(subscription)

    async def _follow_on(self, subscription: Subscription) -> None:
        if batches := await _gather(subscription):
            await self._consume(batches)
        await subscription.report_progress(self._next_offsets())
        now = time.monotonic()
        if now >= self._retry_at:
            self._retry_at = now + intervals.RETRY_SECONDS
            await self._retries.run()
        if self._catch_up.is_due:
            await self._catch_up.run()
        if now >= self._measure_lag_at:
            self._measure_lag_at = now + intervals.LAG_SECONDS
            await self._measure_lag(subscription)

    async def _consume(self, batches: Mapping[int, Sequence[Message]]) -> None:
        """Handle all partitions at once, so that the write path commits them in one transaction if it can."""
        works = [self._consume_partition(partition, messages) for partition, messages in batches.items()]
        outcomes = await asyncio.gather(*works, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        self._backoff.reset()

    async def _consume_partition(self, partition: int, messages: Sequence[Message]) -> None:
        of_store = self._until_store_changes(messages)
        if of_store:
            try:
                await self._handle(partition, self._planner.plan(self._writer.checkpoint(partition), of_store))
            except (PureCodeFailed, FixRequest, NewerVersion, TooMuchParked, TooMuchPassedOver) as error:
                raise_if_transient(error)
                for message in of_store:
                    await self._consume_one(partition, message)
        if len(of_store) < len(messages):
            raise StoreReplaced(
                f"{self._topic}: partition {partition} goes on with events of the store "
                f"{messages[len(of_store)].store_id}, so far they came from {store_id_of(self._writer.checkpoints)}"
            )

    async def _consume_one(self, partition: int, message: Message) -> None:
        """Apply a message, pass it over, or park it."""
        before = self._writer.checkpoint(partition)
        try:
            try:
                await self._handle(partition, self._planner.plan(before, [message]))
            except NewerVersion:
                # A newer version has changed the entity that a reaction concerns.
                await self._handle(partition, self._planner.plan(before, [message], too_new={message.offset}))
                self._catch_up.request()
        except (PureCodeFailed, FixRequest) as error:
            failures = {message.offset: reason_to_park(error)}
            await self._handle(partition, self._planner.plan(before, [message], failures))

    async def _handle(self, partition: int, step: Step) -> None:
        self._parking.require_few(step.parked)
        await self._writer.write(partition, step)
        if step.last is not None:
            CONSUMER_LAG_SECONDS.labels(self._topic).set((self._clock.now() - step.last.time).total_seconds())

    def _until_store_changes(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The first messages, up to one that comes from another store."""
        known = store_id_of(self._writer.checkpoints)
        for index, message in enumerate(messages):
            if message.store_id and known and message.store_id != known:
                return messages[:index]
            known = known or message.store_id
        return messages

    async def _measure_lag(self, subscription: Subscription) -> None:
        next_offsets, ends = self._next_offsets(), await subscription.end_offsets()
        lag = sum(max(0, end - next_offsets.get(partition, 0)) for partition, end in ends.items())
        CONSUMER_LAG_MESSAGES.labels(self._topic).set(lag)

    def _next_offsets(self) -> dict[int, int]:
        return {partition: checkpoint.offset for partition, checkpoint in self._writer.checkpoints.items()}

    async def _stored_checkpoints(self) -> Checkpoints:
        while True:
            try:
                return await stored_checkpoints(self._store, self._topic)
            except PyMongoError as error:
                await self._backoff.wait(error, topic=self._topic)


async def _gather(subscription: Subscription) -> dict[int, list[Message]]:
    """What has arrived, by partition: waits for the first batch, then takes what is there, up to a limit."""
    batches: dict[int, list[Message]] = {}
    total = size_bytes = 0
    batch = await subscription.next_batch(MESSAGES_MAX, intervals.WAIT_SECONDS)
    while batch:
        batches.setdefault(batch[0].partition, []).extend(batch)
        total += len(batch)
        size_bytes += sum(len(message.raw) for message in batch)
        if total >= MESSAGES_MAX or size_bytes >= GATHERED_BYTES_MAX:
            break
        batch = await subscription.next_batch(MESSAGES_MAX - total, 0)
    return batches
