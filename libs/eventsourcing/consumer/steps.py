"""A consumer's step: what handling some messages of one partition changes, first planned, then written at once."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from libs.core.clock import Clock
from libs.core.decider import Act, Projection, PureCodeFailed, Reaction
from libs.core.envelope import Envelope, Metadata
from libs.core.errors import Conflict, RetryLater
from libs.event_log.port import Message
from libs.eventsourcing.batch import OffsetMove, SideWrite
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.offsets import Checkpoint
from libs.eventsourcing.parking import BEHIND_PARKED, Failed, Parking, parking_write
from libs.eventsourcing.passed_over import PassedOver, PassedOverMessage, is_unknown, passing_over_write
from libs.eventsourcing.requests import ConsumerStep
from libs.process.telemetry import consumer_span, current_traceparent

NO_FAILURES: Mapping[int, str] = MappingProxyType({})


@dataclass(slots=True)
class Step:
    """What handling some messages of one partition changes.

    Args:
        after: the checkpoint that it leads to.
        owing_streams: those with a message in ``passed_over`` that owes reactions.
        last: the event that was handled last.
    """

    after: Checkpoint
    projections: list[tuple[Projection, Envelope]] = field(default_factory=list)
    acts: list[tuple[Act, Metadata]] = field(default_factory=list)
    parked: list[Failed] = field(default_factory=list)
    passed_over: list[PassedOverMessage] = field(default_factory=list)
    owing_streams: set[str] = field(default_factory=set)
    side_writes: list[SideWrite] = field(default_factory=list)
    last: Envelope | None = None


class StepPlanner:
    """Plans steps; changes nothing.

    Each message takes one of four ways: a repetition is skipped; one that failed, or whose stream is parked, is parked;
    one that is not understood, or whose reactions have to wait, is passed over; everything else is applied.
    """

    def __init__(
        self,
        projections: Sequence[Projection],
        reactions: Sequence[Reaction],
        parking: Parking,
        passed_over: PassedOver,
    ) -> None:
        self._projections = projections
        self._reactions = reactions
        self._parking = parking
        self._passed_over = passed_over

    def plan(
        self,
        before: Checkpoint,
        messages: Sequence[Message],
        failures: Mapping[int, str] = NO_FAILURES,
        too_new: Collection[int] = (),
    ) -> Step:
        """The step from a checkpoint over the next messages.

        Args:
            failures: the messages, by offset, that are known to fail, and why.
            too_new: the messages, by offset, whose reactions have to wait for a newer version.

        Raises:
            PureCodeFailed: a projection or reaction failed.
        """
        step = Step(before)
        parked_streams: set[str] = set()
        for message in messages:
            if not _advance(step, message):
                continue
            reason = failures.get(message.offset) or message.failure
            if self._parking.holds(message.stream) or message.stream in parked_streams:
                reason = BEHIND_PARKED
            if reason is not None:
                step.parked.append(Failed(message, reason))
                parked_streams.add(message.stream)
            else:
                self.plan_message(step, message, may_react=message.offset not in too_new)
        return step

    def plan_message(self, step: Step, message: Message, *, may_react: bool = True) -> None:
        """Add one message that did not fail to a step; its reactions also wait for those that its stream owes."""
        waits = self._passed_over.holds(message.stream) or message.stream in step.owing_streams
        acts = self.plan_event(step, message)
        owes_reactions = is_unknown(message) or (bool(acts) and (waits or not may_react))
        if owes_reactions:
            step.owing_streams.add(message.stream)
        else:
            step.acts += acts
        if owes_reactions or not _is_understood(message):
            step.passed_over.append(PassedOverMessage(message, owes_reactions))

    def plan_event(self, step: Step, message: Message) -> list[tuple[Act, Metadata]]:
        """Add the projections of an event to a step, and return the commands that it causes."""
        event = message.envelope
        if event is None:
            raise PureCodeFailed(message.failure)
        if is_unknown(message):
            return []
        try:
            step.projections += [(item, event) for item in self._projections if item.key(event) is not None]
            acts = [act for reaction in self._reactions for act in reaction.react(event)]
        except Exception as error:
            raise PureCodeFailed(f"{event.type} {event.id}: {error!r}") from error
        step.last = event
        if not acts:
            return []
        metadata = _metadata_after(event, message.headers)
        return [(act, metadata) for act in acts]


class StepWriter:
    """Writes steps through the service's command handler, each in one transaction.

    ``checkpoints`` are those of the topic as last read or written.
    """

    def __init__(
        self, topic: str, commands: CommandHandler, parking: Parking, passed_over: PassedOver, clock: Clock
    ) -> None:
        self._topic = topic
        self._commands = commands
        self._parking = parking
        self._passed_over = passed_over
        self._clock = clock
        self.checkpoints: dict[int, Checkpoint] = {}

    def checkpoint(self, partition: int) -> Checkpoint:
        return self.checkpoints.get(partition, Checkpoint())

    async def write(self, partition: int, step: Step) -> None:
        """Write a step that was planned from the partition's present checkpoint.

        Raises:
            FixRequest, NewerVersion, PureCodeFailed: a command of the step was refused or failed.
            TooMuchPassedOver: there is no room for what it passes over.
            OffsetMoved: another instance handled the partition meanwhile.
        """
        self._passed_over.require_room(step.passed_over)
        before, after, now = self.checkpoint(partition), step.after, self._clock.now()
        move = OffsetMove(self._topic, partition, before.offset, after.offset, after.position, after.store_id)
        side_writes = [
            *step.side_writes,
            *(parking_write(failed, now) for failed in step.parked),
            *(passing_over_write(item) for item in step.passed_over),
        ]
        await self._commands.consume(ConsumerStep(move, step.projections, step.acts, side_writes))
        self.checkpoints[partition] = after
        self._parking.parked(step.parked)
        self._passed_over.passed_over(step.passed_over)


def raise_if_transient(error: Exception) -> None:
    """Raise ``RetryLater`` if the same step may succeed the next time."""
    if isinstance(error, Conflict) and error.code == "contention":
        raise RetryLater(error.message) from error


def reason_to_park(error: Exception) -> str:
    """Why a message failed; raises ``RetryLater`` if it may succeed the next time."""
    raise_if_transient(error)
    return f"{type(error).__name__}: {error}"[:1000]


def _advance(step: Step, message: Message) -> bool:
    """Move the step's checkpoint over a message; False if the message is a repetition."""
    before = step.after
    step.after = Checkpoint(
        message.offset + 1, max(before.position, message.position), message.store_id or before.store_id
    )
    # A message whose position can't be read can't be told from a repetition, and is not skipped.
    return not 0 < message.position <= before.position


def _is_understood(message: Message) -> bool:
    return message.envelope is not None and message.envelope.is_understood


def _metadata_after(event: Envelope, headers: Mapping[str, str]) -> Metadata:
    """The metadata of the commands that an event causes."""
    with consumer_span(f"consume {event.type}", headers):
        return Metadata(
            project_id=event.metadata.project_id,
            correlation_id=event.metadata.correlation_id,
            causation_id=event.id,
            traceparent=current_traceparent(),
        )
