"""What a batch is decided on, loaded in one round trip with one query for each collection."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

from libs.contracts.registry import is_known
from libs.core.decider import Aggregate, Listing, PureCodeFailed
from libs.core.envelope import Frozen
from libs.core.errors import NewerVersion
from libs.eventsourcing.entities import DOCUMENT_FIELDS, newer_version, state_of, stored_document
from libs.eventsourcing.head import Head
from libs.eventsourcing.requests import QueuedRequest
from libs.mongodb.client import Document
from libs.mongodb.round_trips import Find

Place = tuple[str, int | str]
"""A document's collection, by its logical name, and its id."""
UniqueKey = tuple[str, str]
"""A unique key and the logical name of the collection in which it is unique."""
Run = Callable[[Sequence[Find]], list[list[Document]]]


@dataclass(slots=True)
class Known:
    """An entity as a batch sees it: as it was loaded, or as an earlier request of the batch left it.

    Args:
        number: its number in its aggregate's lists; negative while the commit has yet to assign it.
        time: of its last event; None if an earlier version wrote the document.
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

    def document(self, identifier: int | str) -> Document:
        assert self.state is not None
        return stored_document(
            identifier, self.version, self.project_id, self.keys, self.state, self.number, self.time, self.others
        )


@dataclass(slots=True)
class View:
    """What a batch is decided on.

    Args:
        documents: those of projections.
        owners: the entity that holds a unique key, for the keys that were looked up.
        unreadable: the entities whose documents or events this version can't read, and why.
    """

    entities: dict[Place, Known] = field(default_factory=dict)
    documents: dict[Place, Document] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    idempotency: dict[str, Document] = field(default_factory=dict)
    owners: dict[UniqueKey, int | str] = field(default_factory=dict)
    unreadable: dict[Place, Exception] = field(default_factory=dict)


Query = tuple[Find, Callable[[list[Document]], None]]
"""A query, and what puts its documents into the view."""
AggregatesById = Mapping[int | str, Aggregate[Any]]


def load(requests: Sequence[QueuedRequest], head: Head, run: Run) -> View:
    """Load everything that the requests concern.

    Args:
        run: runs queries in one round trip.
    """
    view = View()
    entities = _entities_of(requests)
    queries = [
        *_queries_of_entities(view, entities, head),
        *_queries_of_projections(view, requests, head),
        *_queries_of_idempotency(view, requests),
        *_queries_of_offsets(view, requests),
        *(_queries_of_newer_events(view, entities, head) if head.newer_types else ()),
    ]
    for (_, take), documents in zip(queries, run([find for find, _ in queries]), strict=True):
        take(documents)
    return view


def owners_of(keys: Collection[UniqueKey], head: Head, run: Run) -> dict[UniqueKey, int | str]:
    """Which entity holds which of these unique keys."""
    by_collection: dict[str, list[str]] = {}
    for collection, key in keys:
        by_collection.setdefault(collection, []).append(key)
    finds = [Find(head.collections[name], {"keys": {"$in": held}}, {"keys": 1}) for name, held in by_collection.items()]
    return {
        (collection, key): document["_id"]
        for collection, documents in zip(by_collection, run(finds), strict=True)
        for document in documents
        for key in document["keys"]
        if (collection, key) in keys
    }


def known_of(aggregate: Aggregate[Any], document: Document) -> Known:
    """The entity in its document; raises as ``state_of``."""
    unknown = document.keys() - DOCUMENT_FIELDS
    return Known(
        document["version"],
        state_of(aggregate, document),
        document["project_id"],
        tuple(document.get("keys", ())),
        number=document.get("number"),
        time=document.get("time"),
        others={name: document[name] for name in unknown} if unknown else None,
    )


def _entities_of(requests: Sequence[QueuedRequest]) -> dict[str, dict[int | str, Aggregate[Any]]]:
    entities: dict[str, dict[int | str, Aggregate[Any]]] = {}
    for request in requests:
        for act, _ in request.acts:
            entities.setdefault(act.aggregate.collection, {})[act.entity_id] = act.aggregate
    return entities


def _queries_of_entities(view: View, entities: Mapping[str, AggregatesById], head: Head) -> Iterable[Query]:
    def take(name: str, aggregates: AggregatesById, documents: list[Document]) -> None:
        for document in documents:
            place = (name, document["_id"])
            try:
                view.entities[place] = known_of(aggregates[document["_id"]], document)
            except (NewerVersion, PureCodeFailed) as error:
                view.unreadable[place] = error

    for name, aggregates in entities.items():
        yield _by_id(head.collections[name], aggregates), partial(take, name, aggregates)


def _queries_of_projections(view: View, requests: Sequence[QueuedRequest], head: Head) -> Iterable[Query]:
    def take(name: str, documents: list[Document]) -> None:
        view.documents.update({(name, document["_id"]): document for document in documents})

    keys: dict[str, set[int | str]] = {}
    for request in requests:
        for projection, envelope in request.projections:
            if (key := projection.key(envelope)) is not None:
                keys.setdefault(projection.collection, set()).add(key)
    for name, identifiers in keys.items():
        yield _by_id(head.collections[name], identifiers), partial(take, name)


def _queries_of_idempotency(view: View, requests: Sequence[QueuedRequest]) -> Iterable[Query]:
    def take(documents: list[Document]) -> None:
        view.idempotency.update({document["_id"]: document for document in documents})

    if ids := [request.idempotency.id for request in requests if request.idempotency]:
        yield _by_id("idempotency", ids), take


def _queries_of_offsets(view: View, requests: Sequence[QueuedRequest]) -> Iterable[Query]:
    def take(documents: list[Document]) -> None:
        view.offsets.update({document["_id"]: document["offset"] for document in documents})

    if keys := [request.offset.key for request in requests if request.offset]:
        yield _by_id("offsets", keys), take


def _queries_of_newer_events(view: View, entities: Mapping[str, AggregatesById], head: Head) -> Iterable[Query]:
    """Those events of the entities' streams that this version can't read."""
    streams = {
        aggregate.stream(entity_id): (name, entity_id, aggregate)
        for name, aggregates in entities.items()
        for entity_id, aggregate in aggregates.items()
    }

    def take(documents: list[Document]) -> None:
        for document in documents:
            if not is_known(document["type"], document["schema_version"]):
                name, entity_id, aggregate = streams[document["stream"]]
                view.unreadable[name, entity_id] = newer_version(aggregate, entity_id)

    if streams:
        criteria = {"stream": {"$in": list(streams)}, "type": {"$in": list(head.newer_types)}}
        yield Find("events", criteria, {"stream": 1, "type": 1, "schema_version": 1}), take


def _by_id(collection: str, identifiers: Iterable[Any]) -> Find:
    return Find(collection, {"_id": {"$in": list(identifiers)}})
