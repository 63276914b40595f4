"""A batch of requests from loading to commit: plain sequential code on the write path's own thread."""

from collections.abc import Sequence
from typing import NamedTuple

import structlog

from libs.core.clock import Clock
from libs.core.envelope import Envelope
from libs.core.errors import Conflict, DataSyncError, RetryLater
from libs.eventsourcing.batch import Batch, DecisionOutdated, OffsetMoved
from libs.eventsourcing.batch_writer import BatchWriter
from libs.eventsourcing.decisions import Decisions, decide
from libs.eventsourcing.event_store import EventStore
from libs.eventsourcing.head import Head
from libs.eventsourcing.requests import Outcome, QueuedRequest
from libs.eventsourcing.view import View, load, owners_of
from libs.mongodb.client import PyMongoError

DECISIONS_MAX = 5

log = structlog.get_logger(__name__)


class Processed(NamedTuple):
    """The events that a batch committed, and its requests that wait for the next one."""

    events: Sequence[Envelope]
    later: list[QueuedRequest]


class BatchProcessor:
    """Decides and commits batches of requests. It blocks.

    Args:
        store: an opened event store.
        clock: gives every event its time.
    """

    def __init__(self, store: EventStore, clock: Clock) -> None:
        self._store = store
        self._writer: BatchWriter = store.writer
        self._clock = clock

    def process(self, requests: Sequence[QueuedRequest]) -> Processed:
        """Set the result of each request, or hand it back for the next batch."""
        undecided, later = list(requests), list[QueuedRequest]()
        while undecided:
            try:
                decisions = self._decide(undecided)
                later += decisions.later
                undecided = [request for request in undecided if request.result is not None]
                if decisions.batch.is_empty():
                    break
                position = self._writer.commit(decisions.batch)
            except DecisionOutdated as outdated:
                undecided = _to_decide_again(undecided, outdated, later)
            except OffsetMoved as moved:
                undecided = _without_offset(undecided, moved)
            except Exception as error:  # noqa: BLE001 - every caller gets the failure, whatever it is
                _fail(undecided, error)
                break
            else:
                return Processed(_committed(undecided, decisions.batch, position), later)
        return Processed((), later)

    def _decide(self, requests: Sequence[QueuedRequest]) -> Decisions:
        """Decide the requests; once more if a unique key turns out to be taken."""
        head = self._store.head_cached or self._writer.read_head()
        view = load(requests, head, self._writer.find)
        now = self._clock.now()
        decisions = decide(requests, view, head, now)
        if self._must_look_up_keys(requests, decisions) and self._learns_owners(view, decisions, head):
            return decide(requests, view, head, now)
        return decisions

    def _must_look_up_keys(self, requests: Sequence[QueuedRequest], decisions: Decisions) -> bool:
        """Whether taken keys have to be known beforehand.

        A request in a batch of its own leaves the check to the unique index, which costs nothing and harms no other
        request if it fails.
        """
        return bool(decisions.claimed) and (len(requests) > 1 or requests[0].decisions > 0)

    def _learns_owners(self, view: View, decisions: Decisions, head: Head) -> bool:
        """Look up the owners of the claimed keys; True if one belongs to another entity than was decided."""
        owners = owners_of(decisions.claimed, head, self._writer.find)
        view.owners.update(owners)
        return any(owner != decisions.claimed[key] for key, owner in owners.items())


def _to_decide_again(
    requests: Sequence[QueuedRequest], outdated: DecisionOutdated, later: list[QueuedRequest]
) -> list[QueuedRequest]:
    """The requests to decide again.

    Those whose decision was outdated are counted: from the second time on, each is tried in a batch of its own, and
    after ``DECISIONS_MAX`` it is refused.
    """
    for request in [request for request in requests if _is_concerned(request, outdated)] or requests:
        request.decisions += 1
        request.alone = request.alone or (request.decisions >= 2 and len(requests) > 1)
    again = []
    for request in requests:
        request.result, request.replay = None, None
        if request.decisions >= DECISIONS_MAX:
            request.result = Conflict("the entity keeps changing; try again", code="contention")
        elif request.alone and len(requests) > 1:
            later.append(request)
        else:
            again.append(request)
    return again


def _is_concerned(request: QueuedRequest, outdated: DecisionOutdated) -> bool:
    if outdated.streams:
        streams = {act.aggregate.stream(act.entity_id) for act, _ in request.acts}
        return not streams.isdisjoint(outdated.streams)
    if outdated.keys:
        return isinstance(request.result, Outcome) and any(
            entity is not None and not set(act.aggregate.unique_keys(entity.state)).isdisjoint(outdated.keys)
            for (act, _), entity in zip(request.acts, request.result.entities, strict=False)
        )
    return True


def _without_offset(requests: Sequence[QueuedRequest], moved: OffsetMoved) -> list[QueuedRequest]:
    """The requests but for the consumer steps at the moved offset, which are refused."""
    remaining = []
    for request in requests:
        if request.offset is not None and request.offset.key == str(moved):
            request.result = moved
        else:
            remaining.append(request)
    return remaining


def _committed(requests: Sequence[QueuedRequest], batch: Batch, position: int) -> Sequence[Envelope]:
    """The batch's events at their positions, also in the requests' results."""
    placed = {envelope.id: envelope.at(number) for number, envelope in enumerate(batch.events, position + 1)}
    for request in requests:
        if isinstance(request.result, Outcome) and request.result.events:
            events = [placed[envelope.id] for envelope in request.result.events]
            request.result = Outcome(request.result.entities, events)
    return list(placed.values())


def _fail(requests: Sequence[QueuedRequest], error: Exception) -> None:
    failure = error
    if isinstance(error, PyMongoError):
        log.warning("store_failed", error=type(error).__name__)
        failure = RetryLater("the store failed; the change was not made", retry_after_seconds=1)
    elif not isinstance(error, DataSyncError):
        log.error("write_path_failed", exc_info=error)
    for request in requests:
        request.result = failure
