"""How the works of one batch are decided: in order, each seeing what those before it did, nothing written yet."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from libs.core.decider import Act, Aggregate, ExpectedVersion, Listing, Projection
from libs.core.envelope import EVENT_SIZE_BYTES_MAX, Envelope, Event, Frozen, Metadata
from libs.core.errors import (
    Conflict,
    DataSyncError,
    FieldError,
    FixRequest,
    NewerVersion,
    NotFound,
    PreconditionFailed,
    TooLarge,
    Unprocessable,
)
from libs.core.ids import uuid7
from libs.eventsourcing.event_store import Batch, Head, OffsetMove, OffsetMoved, SideWrite
from libs.eventsourcing.list_changes import ListChanges
from libs.eventsourcing.requests import (
    DOCUMENT_FIELDS,
    Entity,
    IdempotencyKey,
    Outcome,
    PureCodeFailed,
    state_of,
    stored_document,
)
from libs.mongodb.client import Document

DOCUMENTS_MAX = 1_000
BATCH_BYTES_MAX = 8 * 1024 * 1024


@dataclass(slots=True, eq=False)
class Pending:
    """A work that waits for its batch.

    Args:
        size_bytes: how much memory the texts of its commands take.
    """

    acts: Sequence[tuple[Act, Metadata]]
    projections: Sequence[tuple[Projection, Envelope]]
    offset: OffsetMove | None
    side_writes: Sequence[SideWrite]
    idempotency: IdempotencyKey | None
    future: "asyncio.Future[Outcome]"
    size_bytes: int = 0
    decisions: int = 0
    alone: bool = False
    result: Outcome | BaseException | None = None
    replay: Document | None = None


Place = tuple[str, int | str]


@dataclass(slots=True)
class Known:
    """One document as the batch sees it: what was loaded, then what the batch made of it.

    Args:
        number: its place in its aggregate's lists; below zero while the commit has yet to give it.
        time: of its last event; None where an earlier version wrote the document.
        others: the document's fields that only a newer version knows.
    """

    version: int
    state: Frozen | None
    project_id: int | None
    keys: tuple[str, ...]
    number: int | None = None
    listing: Listing[Any] | None = None
    time: datetime | None = None
    others: Mapping[str, Any] | None = None


@dataclass(slots=True)
class View:
    """Everything a batch decides on.

    Args:
        unreadable: the entities whose documents or events this version can't read, and why.
    """

    aggregates: dict[Place, Known] = field(default_factory=dict)
    documents: dict[Place, Document | None] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    idempotency: dict[str, Document] = field(default_factory=dict)
    owners: dict[tuple[str, str], int | str | None] = field(default_factory=dict)
    """Who holds a unique key of a collection: an entity id, or None for nobody; absent while not asked for."""
    unreadable: dict[Place, Exception] = field(default_factory=dict)


class _Later(Exception):
    """This work has to wait for the batch before it: it meets what that batch is about to change."""


class DecisionPass:
    """One run through a batch's works, from the loaded documents to what is to be written."""

    def __init__(self, now: datetime, view: View, head: Head) -> None:
        self._now = now
        self._view = view
        self._head = head
        self._aggregates: dict[Place, Known] = {}
        self._documents: dict[Place, Document | None] = {}
        self._holders: dict[tuple[str, str], int | str | None] = {}
        self._lists: dict[str, ListChanges] = {}
        self._begun: set[str] = set()
        self._size_bytes = 0
        self._size_documents = 0
        self.claimed: dict[tuple[str, str], int | str] = {}
        self.later: list[Pending] = []
        self._accepted: list[Pending] = []

    def run(self, works: Sequence[Pending]) -> None:
        for pending in works:
            pending.result = None
            if self._accepted and self._full():
                self.later.append(pending)
                continue
            try:
                pending.result = self._work(pending)
            except _Later:
                self.later.append(pending)
            except (FixRequest, NewerVersion, OffsetMoved, PureCodeFailed) as refusal:
                pending.result = refusal

    def batch(self) -> Batch:
        """What the accepted works write together."""
        batch = Batch(self._head.collections, self._head.newer_types, lists=self._lists)
        for pending in self._accepted:
            assert isinstance(pending.result, Outcome)
            batch.events += pending.result.events
            batch.side_writes += pending.side_writes
            if pending.offset is not None:
                batch.offsets.append(pending.offset)
            if pending.idempotency is not None:
                batch.idempotency.append(self._idempotency_record(pending, pending.result))
        batch.kinds = frozenset(event.versioned_type() for event in {type(envelope.data) for envelope in batch.events})
        for (collection, identifier), known in self._aggregates.items():
            assert known.state is not None
            document = stored_document(
                identifier,
                known.version,
                known.project_id,
                known.keys,
                known.state,
                known.number,
                known.time,
                known.others,
            )
            if known.listing is not None and known.number is not None and known.number < 0:
                self._lists[known.listing.collection].documents.append((document, known.number))
            new = (collection, identifier) not in self._view.aggregates
            (batch.inserts if new else batch.replacements).setdefault(collection, []).append(document)
        for (collection, identifier), projected in self._documents.items():
            if projected is None:
                batch.removals.setdefault(collection, []).append(identifier)
            else:
                batch.replacements.setdefault(collection, []).append({**projected, "_id": identifier})
        return batch

    def _full(self) -> bool:
        return self._size_bytes >= BATCH_BYTES_MAX or self._size_documents >= DOCUMENTS_MAX

    def _work(self, pending: Pending) -> Outcome:
        if (key := pending.idempotency) is not None:
            if key.id in self._begun:
                raise _Later
            if (record := self._view.idempotency.get(key.id)) is not None:
                if record["request_hash"] != key.request_hash:
                    raise Unprocessable("this Idempotency-Key was used with another request")
                pending.replay = record
                return Outcome((), replayed=True)
        if (
            pending.offset is not None
            and self._view.offsets.get(pending.offset.key, 0) != pending.offset.expected_offset
        ):
            raise OffsetMoved(pending.offset.key)
        draft = _Draft(self, pending)
        outcome = draft.decide()
        draft.accept()
        if key is not None:
            self._begun.add(key.id)
        self._accepted.append(pending)
        self._size_documents += len(outcome.events) * 2 + len(pending.side_writes) + len(pending.projections)
        written = (write.document for write in pending.side_writes if write.document is not None)
        self._size_bytes += draft.size_bytes() + sum(map(_size_of, written))
        return outcome

    def _idempotency_record(self, pending: Pending, outcome: Outcome) -> Document:
        assert pending.idempotency is not None
        entities = [
            {"aggregate": act.aggregate.name, "id": entity.id, "version": entity.version}
            for (act, _), entity in zip(pending.acts, outcome.entities, strict=True)
            if entity is not None
        ]
        return {
            "_id": pending.idempotency.id,
            "request_hash": pending.idempotency.request_hash,
            "entities": entities,
            "created_at": self._now,
        }


class _Draft:
    """One work's effects, kept apart until all of it is accepted."""

    def __init__(self, batch: DecisionPass, pending: Pending) -> None:
        self._batch = batch
        self._pending = pending
        self._aggregates: dict[Place, Known] = {}
        self._documents: dict[Place, Document | None] = {}
        self._holders: dict[tuple[str, str], int | str | None] = {}
        self._lists: dict[str, ListChanges] = {}
        self._events: list[Envelope] = []

    def decide(self) -> Outcome:
        for projection, envelope in self._pending.projections:
            self._project(projection, envelope)
        entities = [self._act(act, metadata) for act, metadata in self._pending.acts]
        return Outcome(entities, self._events)

    def accept(self) -> None:
        self._batch._aggregates.update(self._aggregates)
        self._batch._documents.update(self._documents)
        self._batch._holders.update(self._holders)
        for collection, changes in self._lists.items():
            self._batch._lists.setdefault(collection, ListChanges()).add(changes)

    def size_bytes(self) -> int:
        """About how much it writes, without what numbers and names take."""
        states = (vars(known.state) for known in self._aggregates.values())
        documents = (document for document in self._documents.values() if document is not None)
        events = sum(len(envelope.data_json) for envelope in self._events)
        return events + sum(map(_size_of, states)) + sum(map(_size_of, documents))

    def _project(self, projection: Projection, envelope: Envelope) -> None:
        try:
            key = projection.key(envelope)
            if key is None:
                return
            place = (projection.collection, key)
            before = self._documents.get(
                place, self._batch._documents.get(place, self._batch._view.documents.get(place))
            )
            self._documents[place] = projection.apply(before, envelope)
        except Exception as error:
            raise PureCodeFailed(f"{projection.collection}: {envelope.type} {envelope.id}: {error!r}") from error

    def _act(self, act: Act, metadata: Metadata) -> Entity[Any] | None:
        place = (act.aggregate.collection, act.entity_id)
        if (unreadable := self._batch._view.unreadable.get(place)) is not None:
            raise unreadable
        known = (
            self._aggregates.get(place) or self._batch._aggregates.get(place) or self._batch._view.aggregates.get(place)
        )
        try:
            return self._decided(act, metadata, place, known)
        except FixRequest:
            if not act.ignore_refusal:
                raise
            return None if known is None or known.state is None else Entity(act.entity_id, known.version, known.state)

    def _decided(self, act: Act, metadata: Metadata, place: Place, known: Known | None) -> Entity[Any]:
        known = known or Known(0, None, None, ())
        if not _is_expected(act.expected_version, known.version):
            raise PreconditionFailed(f"the current version is {known.version}, not {_named(act.expected_version)}")
        if known.project_id is not None and metadata.project_id not in (None, known.project_id):
            raise NotFound(f"{act.aggregate.name} {act.entity_id} does not exist")
        project_id = known.project_id if known.version else metadata.project_id
        if metadata.project_id != project_id:
            metadata = replace(metadata, project_id=project_id)
        try:
            events = act.aggregate.decide(known.state, act.command)
            state, version, number, envelopes = self._evolved(act, metadata, known, events)
            keys = tuple(act.aggregate.unique_keys(state)) if state is not None else ()
        except DataSyncError:
            raise
        except Exception as error:
            raise PureCodeFailed(f"{act.aggregate.name} {act.entity_id}: {act.command!r:.200}: {error!r}") from error
        if not envelopes:
            if state is None:
                raise NotFound(f"{act.aggregate.name} {act.entity_id} does not exist")
            return Entity(act.entity_id, version, state)
        self._claim(act, known.keys, keys)
        time = envelopes[-1].time
        self._aggregates[place] = Known(
            version, state, project_id, keys, number, act.aggregate.listing, time, known.others
        )
        self._events += envelopes
        assert state is not None
        return Entity(act.entity_id, version, state)

    def _evolved(
        self, act: Act, metadata: Metadata, known: Known, events: Sequence[Event]
    ) -> tuple[Frozen | None, int, int | None, list[Envelope]]:
        state, version, number = known.state, known.version, known.number
        listing = act.aggregate.listing
        names = listing.lists(state) if listing is not None and state is not None else ()
        # The times in a stream never decrease, although the clocks of two instances may differ.
        time = self._batch._now if known.time is None else max(known.time, self._batch._now)
        envelopes = []
        for event in events:
            version += 1
            envelope = Envelope(
                id=uuid7(),
                stream=act.aggregate.stream(act.entity_id),
                version=version,
                position=0,
                store_id=self._batch._head.store_id,
                time=time,
                data=event,
                data_json=_encoded(event),
                metadata=metadata,
            )
            state = act.aggregate.evolve(state, envelope)
            envelopes.append(envelope)
            if listing is not None:
                before, names = names, listing.lists(state)
                number = self._changes_of(listing).follow(before, names, number)
        return state, version, number, envelopes

    def _changes_of(self, listing: Listing[Any]) -> ListChanges:
        changes = self._lists.get(listing.collection)
        if changes is None:
            so_far = self._batch._lists.get(listing.collection)
            changes = self._lists[listing.collection] = so_far.continued() if so_far else ListChanges()
        return changes

    def _claim(self, act: Act, before: tuple[str, ...], after: tuple[str, ...]) -> None:
        collection = act.aggregate.collection
        for key in set(before) - set(after):
            self._holders[collection, key] = None
        for key in after:
            if key in before:
                continue
            place = (collection, key)
            self._batch.claimed.setdefault(place, act.entity_id)
            holder = self._batch._holders.get(place, self._batch._view.owners.get(place, _UNKNOWN))
            if self._batch._holders.get(place, _UNKNOWN) is None:
                # Freed earlier in this very batch: the unique index would meet both documents at once.
                raise _Later
            current = self._holders.get(place, holder)
            if current not in (None, _UNKNOWN, act.entity_id):
                field_error = FieldError(act.aggregate.conflict_field, act.aggregate.conflict_message, "taken")
                raise Conflict(act.aggregate.conflict_message, code="already_exists", errors=[field_error])
            self._holders[place] = act.entity_id


_UNKNOWN: Any = object()


def _size_of(fields: Mapping[str, Any]) -> int:
    """The texts among the fields: free-form JSON, the one thing that is large, is kept as text."""
    return sum(len(value) for value in fields.values() if isinstance(value, str | bytes))


def known_of(aggregate: Aggregate[Any], document: Document) -> Known:
    """Raises as ``state_of``."""
    state = state_of(aggregate, document)
    keys = tuple(document.get("keys", ()))
    unknown = document.keys() - DOCUMENT_FIELDS
    return Known(
        document["version"],
        state,
        document["project_id"],
        keys,
        number=document.get("number"),
        time=document.get("time"),
        others={name: document[name] for name in unknown} if unknown else None,
    )


def _encoded(event: Event) -> bytes:
    encoded = event.model_dump_json().encode()
    if len(encoded) > EVENT_SIZE_BYTES_MAX:
        # What was sent is counted. Free-form JSON is text within the event; escaping its quotes at most doubles it.
        sizes = {name: len(value.encode()) for name, value in event if isinstance(value, str)}
        if sum(sizes.values()) > EVENT_SIZE_BYTES_MAX or len(encoded) > 2 * EVENT_SIZE_BYTES_MAX:
            largest = max(sizes, key=lambda name: sizes[name]) if sizes else "event"
            message = f"is {sizes.get(largest, len(encoded))} bytes; at most {EVENT_SIZE_BYTES_MAX} are kept"
            raise TooLarge(f"{largest}: {message}", errors=[FieldError(largest, message, "too_large")])
    return encoded


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
