"""Follows one topic: every event updates the projections and causes its reactions exactly once.

The offset of each partition lies in the consumer's own database and moves in the transaction that writes what the
messages caused. Whatever goes wrong, the consumer begins again from the stored offsets; a message that comes again is
known by its position, which is not above the highest one seen in its partition.

What only a newer version understands is passed over and remembered, and with it the later reactions to its stream; they
are made good, in order, once that version runs.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import structlog

from libs.core.clock import Clock, SystemClock
from libs.core.decider import Act, Projection, PureCodeFailed, Reaction
from libs.core.envelope import Envelope, Metadata
from libs.core.errors import Conflict, FixRequest, NewerVersion, RetryLater
from libs.event_log.port import EventLog, Message, OffsetOutOfRange, Subscription
from libs.eventsourcing.batch import OffsetMove, OffsetMoved, SideWrite
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.event_store import EventStore
from libs.eventsourcing.offsets import Checkpoint, store_id_of, stored_checkpoints
from libs.eventsourcing.parking import STREAM_IS_PARKED, Parking, parking_write, unparking_write
from libs.eventsourcing.passed_over import (
    PassedOver,
    PassedOverMessage,
    TooMuchPassedOver,
    forgetting_write,
    is_unknown,
    passing_over_write,
)
from libs.eventsourcing.requests import ConsumerStep
from libs.eventsourcing.stops import forget_stop, note_stop
from libs.mongodb.client import ConnectionFailure, PyMongoError, in_short
from libs.process.health import Health
from libs.process.telemetry import (
    CONSUMER_LAG_MESSAGES,
    CONSUMER_LAG_SECONDS,
    CONSUMER_STOPPED,
    consumer_span,
    current_traceparent,
)

MESSAGES_MAX = 400
GATHERED_BYTES_MAX = 8 * 1024 * 1024
WAIT_SECONDS = 1.0
CHORES_SECONDS = 1.0
LAG_SECONDS = 5.0
STOPPED_POLL_SECONDS = 2.0
CATCH_UP_SECONDS = 30.0
PARKED_STREAMS_MAX = 100
PARKED_WITHIN_SECONDS = 60.0
BACKOFF_SECONDS_MAX = 10.0

NOTHING: Mapping[int, str] = MappingProxyType({})

log = structlog.get_logger(__name__)


class StoreReplaced(Exception):
    """The messages come from another store than before: its owner's database was restored or replaced."""


class TooMuchParked(Exception):
    """So many streams fail that the cause is elsewhere; parking them all would hide it."""


@dataclass(slots=True)
class _Step:
    """What some messages of one partition come to."""

    after: Checkpoint
    projections: list[tuple[Projection, Envelope]] = field(default_factory=list)
    acts: list[tuple[Act, Metadata]] = field(default_factory=list)
    parked: list[tuple[Message, str]] = field(default_factory=list)
    passed_over: list[PassedOverMessage] = field(default_factory=list)
    owing_streams: set[str] = field(default_factory=set)
    last: Envelope | None = None


class Consumer:
    """A service's reader of one topic.

    Args:
        topic: the topic to follow.
        event_log: where from.
        store, commands: the service's own; everything is written through them.
        health: told while the topic waits for a repair.
        projections, reactions: those of the service that follow this topic.
        refold: folds the service's projections anew from the log, and tells whether it could.
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
        self._commands = commands
        self._projections = projections
        self._reactions = reactions
        self._clock = clock or SystemClock()
        self._refold = refold
        self._parking = Parking(store.database, topic)
        self._parked_at: deque[float] = deque(maxlen=PARKED_STREAMS_MAX)
        self._passed_over = PassedOver(store.database, topic)
        # What this version can't understand is not looked at again until another version runs.
        self._may_catch_up = False
        self._catch_up_at = 0.0
        self._checkpoints: dict[int, Checkpoint] = {}
        self._failures = 0
        self._chores_at = 0.0
        self._lag_at = 0.0
        self._stopped_because: str | None = None
        health.add(f"consumer {topic}", self._reason_to_be_stopped)

    async def run(self) -> None:
        """Follow the topic until cancelled; one instance at a time, under the topic's lease."""
        try:
            while True:
                try:
                    await self._follow()
                except (OffsetOutOfRange, StoreReplaced, TooMuchParked, TooMuchPassedOver) as error:
                    await self._wait_for_repair(error)
                except (OSError, PyMongoError, RetryLater, OffsetMoved) as error:
                    await self._back_off(error)
        finally:
            self._resume()

    async def _follow(self) -> None:
        self._checkpoints = await stored_checkpoints(self._store, self._topic)
        await self._parking.load()
        await self._catch_up()
        offsets = {partition: place.offset for partition, place in self._checkpoints.items() if place.offset > 0}
        async with self._event_log.subscribe(self._topic, offsets) as subscription:
            await self._follow_on(subscription)
            # An earlier process may have stopped for what is no obstacle any more, such as its version.
            await forget_stop(self._store, self._topic)
            while True:
                await self._follow_on(subscription)

    async def _follow_on(self, subscription: Subscription) -> None:
        batches = await _gather(subscription)
        if batches:
            await self._consume(batches)
        await self._chores(subscription)

    async def _consume(self, batches: Mapping[int, Sequence[Message]]) -> None:
        """Partitions go to the write path together, which commits them in one transaction where it can."""
        works = [self._consume_partition(partition, messages) for partition, messages in batches.items()]
        outcomes = await asyncio.gather(*works, return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if failures:
            raise failures[0]
        self._failures = 0

    async def _consume_partition(self, partition: int, messages: Sequence[Message]) -> None:
        own = self._until_store_changes(messages)
        if own:
            try:
                await self._commit(partition, own)
            except (PureCodeFailed, FixRequest, NewerVersion, TooMuchParked, TooMuchPassedOver) as error:
                _raise_if_transient(error)
                for message in own:
                    await self._consume_one(partition, message)
        if len(own) < len(messages):
            foreign = messages[len(own)]
            raise StoreReplaced(
                f"{self._topic}: partition {partition} goes on with events of the store {foreign.store_id}, "
                f"so far they came from {store_id_of(self._checkpoints)}"
            )

    async def _consume_one(self, partition: int, message: Message) -> None:
        try:
            try:
                await self._commit(partition, [message])
            except NewerVersion:
                # The entity that it would change was changed by a newer version.
                await self._commit(partition, [message], too_new={message.offset})
                self._may_catch_up = True
        except (PureCodeFailed, FixRequest) as error:
            _raise_if_transient(error)
            await self._commit(partition, [message], {message.offset: _reason_of(error)})

    async def _commit(
        self,
        partition: int,
        messages: Sequence[Message],
        failures: Mapping[int, str] = NOTHING,
        too_new: Collection[int] = (),
    ) -> None:
        """Handle messages in one transaction with the offset that they move to.

        Args:
            failures: the messages, by offset, that are known to fail, and why.
            too_new: those, by offset, whose reactions have to wait for a newer version.
        """
        before = self._checkpoints.get(partition, Checkpoint())
        step = self._plan(before, messages, failures, too_new)
        self._require_few_parked(step)
        self._passed_over.require_room(step.passed_over)
        now = self._clock.now()
        side_writes = [parking_write(message, reason, now) for message, reason in step.parked]
        await self._write(partition, before, step, side_writes)
        self._checkpoints[partition] = step.after
        self._count_parked(step.parked)
        self._passed_over.added(step.passed_over)
        if step.last is not None:
            CONSUMER_LAG_SECONDS.labels(self._topic).set((now - step.last.time).total_seconds())

    def _require_few_parked(self, step: _Step) -> None:
        """Stop the topic if too many streams fail within a minute: then the messages are not the cause."""
        reasons = [reason for _, reason in step.parked if reason is not STREAM_IS_PARKED]
        since = time.monotonic() - PARKED_WITHIN_SECONDS
        recently = sum(parked_at > since for parked_at in self._parked_at)
        if reasons and recently + len(reasons) > PARKED_STREAMS_MAX:
            raise TooMuchParked(
                f"{self._topic}: {recently} streams were parked within {PARKED_WITHIN_SECONDS:g} s, and the next one "
                f"fails too: {reasons[0]}"
            )

    def _count_parked(self, parked: Sequence[tuple[Message, str]]) -> None:
        self._parking.parked([message for message, _ in parked])
        for message, reason in parked:
            if reason is not STREAM_IS_PARKED:
                self._parked_at.append(time.monotonic())
                log.error(
                    "message_parked",
                    topic=self._topic,
                    stream=message.stream,
                    event_id=message.event_id,
                    event_type=message.event_type,
                    reason=reason,
                    repair=f"datasync parked {self._service} --retry",
                )

    def _plan(
        self, before: Checkpoint, messages: Sequence[Message], failures: Mapping[int, str], too_new: Collection[int]
    ) -> _Step:
        step = _Step(before)
        parked_streams: set[str] = set()
        for message in messages:
            # A message without a readable position can't be told from a repeat, and is never passed over.
            repeated = 0 < message.position <= step.after.position
            position, store_id = max(step.after.position, message.position), message.store_id or step.after.store_id
            step.after = Checkpoint(message.offset + 1, position, store_id)
            if repeated:
                continue
            reason = failures.get(message.offset) or message.failure
            if self._parking.holds(message.stream) or message.stream in parked_streams:
                reason = STREAM_IS_PARKED
            if reason is not None:
                step.parked.append((message, reason))
                parked_streams.add(message.stream)
            else:
                waits = self._passed_over.holds(message.stream) or message.stream in step.owing_streams
                self._plan_message(step, message, may_react=not waits and message.offset not in too_new)
        return step

    def _plan_message(self, step: _Step, message: Message, *, may_react: bool) -> None:
        if message.envelope is None:
            raise PureCodeFailed(message.failure)
        acts = [] if is_unknown(message) else self._plan_event(step, message.envelope, message.headers)
        owes_reactions = is_unknown(message) or (bool(acts) and not may_react)
        if owes_reactions:
            step.owing_streams.add(message.stream)
        else:
            step.acts += acts
        if owes_reactions or not message.envelope.is_understood:
            step.passed_over.append(PassedOverMessage(message, owes_reactions))

    def _plan_event(self, step: _Step, envelope: Envelope, headers: Mapping[str, str]) -> list[tuple[Act, Metadata]]:
        """Plan the event's projections and return the commands that it causes."""
        try:
            concerned = [item for item in self._projections if item.key(envelope) is not None]
            acts = [act for reaction in self._reactions for act in reaction.react(envelope)]
        except Exception as error:
            raise PureCodeFailed(f"{envelope.type} {envelope.id}: {error!r}") from error
        step.projections += [(projection, envelope) for projection in concerned]
        step.last = envelope
        if not acts:
            return []
        with consumer_span(f"consume {envelope.type}", headers):
            metadata = Metadata(
                project_id=envelope.metadata.project_id,
                correlation_id=envelope.metadata.correlation_id,
                causation_id=envelope.id,
                traceparent=current_traceparent(),
            )
        return [(act, metadata) for act in acts]

    async def _write(self, partition: int, before: Checkpoint, step: _Step, side_writes: Sequence[SideWrite]) -> None:
        after = step.after
        move = OffsetMove(self._topic, partition, before.offset, after.offset, after.position, after.store_id)
        passing_over = [passing_over_write(item) for item in step.passed_over]
        await self._commands.consume(ConsumerStep(move, step.projections, step.acts, [*side_writes, *passing_over]))

    async def _chores(self, subscription: Subscription) -> None:
        now = time.monotonic()
        next_offsets = {partition: place.offset for partition, place in self._checkpoints.items()}
        await subscription.report_progress(next_offsets)
        if now - self._chores_at >= CHORES_SECONDS and not self._parking.is_empty:
            self._chores_at = now
            for stream in await self._parking.streams_to_retry():
                await self._retry_stream(stream)
        if self._may_catch_up and now >= self._catch_up_at:
            await self._catch_up()
        if now - self._lag_at >= LAG_SECONDS:
            self._lag_at = now
            ends = await subscription.end_offsets()
            lag = sum(max(0, end - next_offsets.get(partition, 0)) for partition, end in ends.items())
            CONSUMER_LAG_MESSAGES.labels(self._topic).set(lag)

    async def _retry_stream(self, stream: str) -> None:
        """Handle a stream's parked messages in order, up to the first that still fails."""
        async for identifier, message in self._parking.messages_of(stream):
            place = self._checkpoints[message.partition]
            try:
                step = _Step(place)
                self._plan_message(step, message, may_react=not self._passed_over.holds(stream))
                self._passed_over.require_room(step.passed_over)
                await self._write(message.partition, place, step, [unparking_write(identifier)])
                self._passed_over.added(step.passed_over)
            except (PureCodeFailed, FixRequest, NewerVersion) as error:
                _raise_if_transient(error)
                await self._parking.failed_again(identifier, stream, _reason_of(error))
                return
            log.info("parked_message_handled", topic=self._topic, stream=stream, parked=identifier)
        await self._parking.released()

    async def _catch_up(self) -> None:
        """Handle passed-over messages, of each stream up to the first that this version does not understand."""
        self._catch_up_at = time.monotonic() + CATCH_UP_SECONDS
        self._may_catch_up = False
        waiting: set[str] = set()
        caught_up: list[str] = []
        async for item in self._passed_over.messages():
            if item.message.stream in waiting:
                continue
            if item.is_understood and await self._react_late(item):
                caught_up.append(item.message.id)
            else:
                waiting.add(item.message.stream)
                self._may_catch_up |= item.is_understood
        if caught_up and self._refold is not None and not await self._refold():
            self._may_catch_up = True
        elif caught_up:
            await self._passed_over.forget(caught_up)
            log.info("passed_over_messages_handled", topic=self._topic, messages=len(caught_up))
        await self._passed_over.load()

    async def _react_late(self, item: PassedOverMessage) -> bool:
        """Cause the reactions that a message owes; False while they concern what is ahead of this version."""
        message = item.message
        if not item.owes_reactions:
            return True
        place = self._checkpoints.get(message.partition, Checkpoint())
        reason = STREAM_IS_PARKED
        try:
            if not self._parking.holds(message.stream):
                step = _Step(place)
                self._plan_message(step, message, may_react=True)
                step.passed_over = [PassedOverMessage(message, owes_reactions=False)]
                # The projections are folded anew, in the log's order.
                step.projections.clear()
                await self._write(message.partition, place, step, [])
                return True
        except NewerVersion:
            return False
        except (PureCodeFailed, FixRequest) as error:
            _raise_if_transient(error)
            reason = _reason_of(error)
        parking = [parking_write(message, reason, self._clock.now()), forgetting_write(message)]
        await self._write(message.partition, place, _Step(place), parking)
        self._count_parked([(message, reason)])
        return True

    def _until_store_changes(self, messages: Sequence[Message]) -> Sequence[Message]:
        known = store_id_of(self._checkpoints)
        for index, message in enumerate(messages):
            if message.store_id and known and message.store_id != known:
                return messages[:index]
            known = known or message.store_id
        return messages

    @property
    def _service(self) -> str:
        return self._store.database.name.removeprefix("datasync_")

    async def _wait_for_repair(self, error: Exception) -> None:
        """The topic stands still, loudly, until an operator has changed the stored offsets."""
        repair = f"datasync repair {self._service} {self._topic}"
        remedy = "run the newer version" if isinstance(error, TooMuchPassedOver) else f"repair it with `{repair}`"
        await note_stop(self._store, self._topic, str(error))
        self._stopped_because = f"stopped: {error}; {remedy}"
        CONSUMER_STOPPED.labels(self._topic).set(1)
        log.error("consumer_stopped", topic=self._topic, reason=str(error), remedy=remedy)
        # What was followed, not what is stored by now: that may be the repair already, which would then be waited for.
        before = dict(self._checkpoints)
        while await self._checkpoints_when_reachable() == before:  # noqa: ASYNC110 - the change comes from another process
            await asyncio.sleep(STOPPED_POLL_SECONDS)
        log.info("consumer_repaired", topic=self._topic)
        self._parked_at.clear()
        self._resume()

    async def _checkpoints_when_reachable(self) -> dict[int, Checkpoint]:
        while True:
            try:
                return await stored_checkpoints(self._store, self._topic)
            except PyMongoError as error:
                await self._back_off(error)

    async def _back_off(self, error: Exception) -> None:
        self._failures += 1
        delay_seconds = min(BACKOFF_SECONDS_MAX, 0.05 * 2.0 ** min(self._failures, 10)) * (0.5 + random.random() / 2)
        report = log.debug if isinstance(error, ConnectionFailure) and self._failures > 1 else log.warning
        report("consumer_waits", topic=self._topic, error=in_short(error))
        await asyncio.sleep(delay_seconds)

    async def _reason_to_be_stopped(self) -> str | None:
        return self._stopped_because

    def _resume(self) -> None:
        self._stopped_because = None
        CONSUMER_STOPPED.labels(self._topic).set(0)


async def _gather(subscription: Subscription) -> dict[int, list[Message]]:
    """What has come, by partition: waits for the first batch, then takes what is there, up to the limit."""
    batches: dict[int, list[Message]] = {}
    total = size_bytes = 0
    batch = await subscription.next_batch(MESSAGES_MAX, WAIT_SECONDS)
    while batch:
        batches.setdefault(batch[0].partition, []).extend(batch)
        total += len(batch)
        size_bytes += sum(len(message.raw) for message in batch)
        if total >= MESSAGES_MAX or size_bytes >= GATHERED_BYTES_MAX:
            break
        batch = await subscription.next_batch(MESSAGES_MAX - total, 0)
    return batches


def _reason_of(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:1000]


def _raise_if_transient(error: Exception) -> None:
    """Contention is no property of the message: the same step may go through the next time."""
    if isinstance(error, Conflict) and error.code == "contention":
        raise RetryLater(error.message) from error
