"""How one request of a batch is decided. Its changes are kept apart, so that a refused request leaves none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from libs.core.decider import Act, ExpectedVersion, Listing, Projection, PureCodeFailed
from libs.core.entity import Entity
from libs.core.envelope import EVENT_SIZE_BYTES_MAX, Envelope, Event, Metadata
from libs.core.errors import (
    Conflict,
    DataSyncError,
    FieldError,
    FixRequest,
    NotFound,
    PreconditionFailed,
    TooLarge,
)
from libs.core.ids import uuid7
from libs.eventsourcing.list_changes import ListChanges
from libs.eventsourcing.requests import Outcome, QueuedRequest
from libs.eventsourcing.view import Known, Place, UniqueKey, View
from libs.mongodb.client import Document


class MustWait(Exception):
    """The request depends on what its own batch is about to change, so it waits for the next batch."""


@dataclass(slots=True)
class Changes:
    """What decided requests change.

    Args:
        documents: those of projections; None for a deleted one.
        holders: who holds a unique key from now on; None for a freed one.
        claimed: the first entity that asked for each unique key, whether it got it or not.
    """

    entities: dict[Place, Known] = field(default_factory=dict)
    documents: dict[Place, Document | None] = field(default_factory=dict)
    holders: dict[UniqueKey, int | str | None] = field(default_factory=dict)
    lists: dict[str, ListChanges] = field(default_factory=dict)
    claimed: dict[UniqueKey, int | str] = field(default_factory=dict)

    def add(self, later: "Changes") -> None:
        """Add an accepted request's changes; its claims are here already."""
        self.entities.update(later.entities)
        self.documents.update(later.documents)
        self.holders.update(later.holders)
        for collection, changes in later.lists.items():
            self.lists.setdefault(collection, ListChanges()).accept(changes)


class RequestDraft:
    """One request on top of what the batch has changed so far.

    Args:
        batch: the changes of the requests before it.
        view: what was loaded.
        now: the time of new events.
    """

    def __init__(self, request: QueuedRequest, batch: Changes, view: View, store_id: str, now: datetime) -> None:
        self._request = request
        self._batch = batch
        self._view = view
        self._store_id = store_id
        self._now = now
        self._events: list[Envelope] = []
        self.changes = Changes()

    def decide(self) -> Outcome:
        """Apply the projections, then decide the acts in order.

        Raises:
            MustWait: it has to be decided in the next batch.
            FixRequest: an act was refused.
            NewerVersion: this version can't read one of the entities.
            PureCodeFailed: the domain's code failed.
        """
        for projection, envelope in self._request.projections:
            self._project(projection, envelope)
        entities = [self._act(act, metadata) for act, metadata in self._request.acts]
        return Outcome(entities, self._events)

    def size_bytes(self) -> int:
        """About how much it writes; numbers and names are not counted."""
        states = (vars(known.state) for known in self.changes.entities.values())
        documents = (document for document in self.changes.documents.values() if document is not None)
        events = sum(len(envelope.data_json) for envelope in self._events)
        return events + sum(map(text_size, states)) + sum(map(text_size, documents))

    def _project(self, projection: Projection, envelope: Envelope) -> None:
        try:
            key = projection.key(envelope)
            if key is None:
                return
            place = (projection.collection, key)
            self.changes.documents[place] = projection.apply(self._document(place), envelope)
        except Exception as error:
            raise PureCodeFailed(f"{projection.collection}: {envelope.type} {envelope.id}: {error!r}") from error

    def _document(self, place: Place) -> Document | None:
        for changes in (self.changes, self._batch):
            if place in changes.documents:
                return changes.documents[place]
        return self._view.documents.get(place)

    def _act(self, act: Act, metadata: Metadata) -> Entity[Any] | None:
        place = (act.aggregate.collection, act.entity_id)
        if (unreadable := self._view.unreadable.get(place)) is not None:
            raise unreadable
        known = self.changes.entities.get(place) or self._batch.entities.get(place) or self._view.entities.get(place)
        try:
            return self._decide(act, metadata, known or Known(0, None, None, ()))
        except FixRequest:
            if not act.ignore_refusal:
                raise
            return None if known is None else _entity(act, known)

    def _decide(self, act: Act, metadata: Metadata, known: Known) -> Entity[Any]:
        _require_version(act, known)
        metadata = _in_project(act, metadata, known)
        try:
            events = act.aggregate.decide(known.state, act.command)
            after, envelopes = self._evolve(act, metadata, known, events)
        except DataSyncError:
            raise
        except Exception as error:
            raise PureCodeFailed(f"{act.aggregate.name} {act.entity_id}: {act.command!r:.200}: {error!r}") from error
        entity = _entity(act, after)
        if entity is None:
            raise _not_found(act)
        if envelopes:
            self._move_keys(act, known.keys, after.keys)
            self.changes.entities[act.aggregate.collection, act.entity_id] = after
            self._events += envelopes
        return entity

    def _evolve(
        self, act: Act, metadata: Metadata, known: Known, events: Sequence[Event]
    ) -> tuple[Known, list[Envelope]]:
        aggregate, listing = act.aggregate, act.aggregate.listing
        state, version, number = known.state, known.version, known.number
        names = listing.lists(state) if listing is not None and state is not None else ()
        # The times in a stream never decrease, although the clocks of two instances may differ.
        time = self._now if known.time is None else max(known.time, self._now)
        envelopes = []
        for event in events:
            version += 1
            envelope = Envelope(
                id=uuid7(),
                stream=aggregate.stream(act.entity_id),
                version=version,
                position=0,
                store_id=self._store_id,
                time=time,
                data=event,
                data_json=_encoded(event),
                metadata=metadata,
            )
            state = aggregate.evolve(state, envelope)
            envelopes.append(envelope)
            if listing is not None:
                before, names = names, listing.lists(state)
                number = self._list_changes(listing).move(before, names, number)
        keys = tuple(aggregate.unique_keys(state)) if state is not None else ()
        return Known(version, state, metadata.project_id, keys, number, listing, time, known.others), envelopes

    def _list_changes(self, listing: Listing[Any]) -> ListChanges:
        changes = self.changes.lists.get(listing.collection)
        if changes is None:
            so_far = self._batch.lists.get(listing.collection)
            changes = self.changes.lists[listing.collection] = so_far.draft() if so_far else ListChanges()
        return changes

    def _move_keys(self, act: Act, before: tuple[str, ...], after: tuple[str, ...]) -> None:
        """Free the unique keys that the entity no longer holds, and take its new ones."""
        for text in set(before) - set(after):
            self.changes.holders[act.aggregate.collection, text] = None
        for text in after:
            if text not in before:
                self._take_key(act, (act.aggregate.collection, text))

    def _take_key(self, act: Act, key: UniqueKey) -> None:
        self._batch.claimed.setdefault(key, act.entity_id)
        if self._batch.holders.get(key, act.entity_id) is None:
            # An earlier request of this batch freed it, and the unique index would see both documents at once.
            raise MustWait
        owner = self._batch.holders.get(key, self._view.owners.get(key))
        if self.changes.holders.get(key, owner) not in (None, act.entity_id):
            error = FieldError(act.aggregate.conflict_field, act.aggregate.conflict_message, "taken")
            raise Conflict(act.aggregate.conflict_message, code="already_exists", errors=[error])
        self.changes.holders[key] = act.entity_id


def text_size(fields: Mapping[str, Any]) -> int:
    """The length of the texts among the fields. Only these are large, because free-form JSON is kept as text."""
    return sum(len(value) for value in fields.values() if isinstance(value, str | bytes))


def _require_version(act: Act, known: Known) -> None:
    if not _is_expected(act.expected_version, known.version):
        raise PreconditionFailed(f"the current version is {known.version}, not {_named(act.expected_version)}")


def _in_project(act: Act, metadata: Metadata, known: Known) -> Metadata:
    """The metadata with the entity's project; the first event decides which that is."""
    if known.project_id is not None and metadata.project_id not in (None, known.project_id):
        raise _not_found(act)
    project_id = known.project_id if known.version else metadata.project_id
    return metadata if metadata.project_id == project_id else replace(metadata, project_id=project_id)


def _entity(act: Act, known: Known) -> Entity[Any] | None:
    return None if known.state is None else Entity(act.entity_id, known.version, known.state, known.project_id)


def _not_found(act: Act) -> NotFound:
    return NotFound(f"{act.aggregate.name} {act.entity_id} does not exist")


def _is_expected(expected: ExpectedVersion, version: int) -> bool:
    match expected:
        case None:
            return True
        case int():
            return version == expected
        case frozenset():
            return version in expected


def _named(expected: ExpectedVersion) -> str:
    return " or ".join(map(str, sorted(expected))) if isinstance(expected, frozenset) else str(expected)


def _encoded(event: Event) -> bytes:
    encoded = event.model_dump_json().encode()
    if len(encoded) > EVENT_SIZE_BYTES_MAX:
        # What the client sent is counted. Free-form JSON is text in the event; escaping its quotes at most doubles it.
        sizes = {name: len(value.encode()) for name, value in event if isinstance(value, str)}
        if sum(sizes.values()) > EVENT_SIZE_BYTES_MAX or len(encoded) > 2 * EVENT_SIZE_BYTES_MAX:
            largest = max(sizes, key=lambda name: sizes[name]) if sizes else "event"
            message = f"is {sizes.get(largest, len(encoded))} bytes; at most {EVENT_SIZE_BYTES_MAX} are kept"
            raise TooLarge(f"{largest}: {message}", errors=[FieldError(largest, message, "too_large")])
    return encoded
