"""Given/when/then for domains: events that happened, a command, the events or the refusal that follow.

``given(SOURCE, created).when(Rename("b")).then(SourceRenamed(name="b"))``. Pure, so no test needs a mock.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from libs.core.decider import Aggregate
from libs.core.envelope import Envelope, Event, Frozen, Metadata
from libs.core.errors import DataSyncError
from libs.core.ids import uuid7

State = TypeVar("State", bound=Frozen)

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
"""The time of every event that is not given one."""

SOMEBODY = Metadata(actor="ada", project_id=123, correlation_id="request-1")


def envelope(
    event: Event,
    *,
    stream: str = "thing-1",
    version: int = 1,
    position: int = 1,
    store_id: str = "store",
    time: datetime = MOMENT,
    metadata: Metadata = SOMEBODY,
) -> Envelope:
    """An event as the store or the log would give it."""
    data_json = event.model_dump_json().encode()
    return Envelope(uuid7(), stream, version, position, store_id, time, event, data_json, metadata)


@dataclass(frozen=True)
class Given(Generic[State]):
    """What happened before, and the state that came of it."""

    aggregate: Aggregate[State]
    state: State | None
    version: int
    metadata: Metadata

    def when(self, command: Any) -> "Then[State]":
        """Decide, and fold what was decided into the state."""
        try:
            events = tuple(self.aggregate.decide(self.state, command))
        except DataSyncError as refusal:
            return Then(self, (), refusal)
        return Then(_fold(self, events), events, None)


@dataclass(frozen=True)
class Then(Generic[State]):
    """What came of a command."""

    after: Given[State]
    events: tuple[Event, ...]
    refusal: DataSyncError | None

    def then(self, *expected: Event) -> "Given[State]":
        """These events happened, in this order; none means nothing did."""
        assert self.refusal is None, f"refused: {self.refusal!r}"
        assert self.events == expected
        return self.after

    def then_refused(self, kind: type[DataSyncError], *, code: str | None = None) -> DataSyncError:
        """The command was refused by such an error."""
        assert self.refusal is not None, f"not refused: {self.events}"
        assert isinstance(self.refusal, kind), repr(self.refusal)
        assert code is None or self.refusal.code == code
        return self.refusal

    @property
    def state(self) -> State:
        """The state after the events."""
        assert self.refusal is None, f"refused: {self.refusal!r}"
        assert self.after.state is not None, "there is no entity"
        return self.after.state


def given(aggregate: Aggregate[State], *events: Event, metadata: Metadata = SOMEBODY) -> Given[State]:
    """An entity to which ``events`` happened; one that does not exist without any."""
    return _fold(Given(aggregate, None, 0, metadata), events)


def _fold(before: Given[State], events: Sequence[Event]) -> Given[State]:
    state, version = before.state, before.version
    for event in events:
        version += 1
        stream = before.aggregate.stream(1)
        happened = envelope(event, stream=stream, version=version, position=version, metadata=before.metadata)
        state = before.aggregate.evolve(state, happened)
    return Given(before.aggregate, state, version, before.metadata)
