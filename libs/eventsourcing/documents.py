"""Reads of a service's own documents."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

from libs.core.decider import Aggregate
from libs.core.entity import Entity
from libs.core.envelope import Envelope, Frozen
from libs.core.errors import NotFound
from libs.eventsourcing.entities import entity_of, fold_entity
from libs.eventsourcing.event_store import EventStore
from libs.mongodb.client import ClientSession, Collection, Document, OperationFailure, SyncCollection, is_passing
from libs.process.coalescer import Coalescer
from libs.process.read_budget import counted, note_read

LOOKUPS_MAX = 500
SNAPSHOT_ATTEMPTS_MAX = 5
SNAPSHOT_PAUSE_SECONDS = 0.02

State = TypeVar("State", bound=Frozen)
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads in one snapshot.

    Args:
        collection: the live collection of a logical name; ``session`` must be passed to each of its reads.
    """

    collection: Callable[[str], SyncCollection[Document]]
    session: ClientSession


class Documents:
    """Reads the owner's documents. A read sees every command that was acknowledged before it.

    Args:
        store: the service's opened store.
    """

    def __init__(self, store: EventStore) -> None:
        self._store = store
        self._by_id: dict[str, Coalescer[Any, Document]] = {}

    def collection(self, name: str) -> Collection:
        """The live collection of an aggregate or projection, for other queries; these must filter by project."""
        return self._store.database[self._store.live_collection(name)]

    def plain(self, name: str) -> Collection:
        """A collection outside event sourcing: sessions, secrets, leases, logs."""
        return self._store.database[name]

    async def in_snapshot(self, read: Callable[[Reader], Result]) -> Result:
        """Run several reads in one snapshot, which contains every acknowledged command.

        Args:
            read: plain blocking code; it runs on a thread, so it costs one hop whatever the number of its reads. It is
                repeated if the server can't give the snapshot at the moment.
        """
        for attempt in range(SNAPSHOT_ATTEMPTS_MAX - 1):
            try:
                return await asyncio.to_thread(self._read, read)
            except OperationFailure as error:
                if not is_passing(error):
                    raise
            await asyncio.sleep(SNAPSHOT_PAUSE_SECONDS * 2**attempt)
        return await asyncio.to_thread(self._read, read)

    def _read(self, read: Callable[[Reader], Result]) -> Result:
        database = self._store.sync_database
        with database.client.start_session(snapshot=True) as session:
            return read(Reader(lambda name: database[self._store.live_collection(name)], session))

    async def document(self, collection: str, identifier: Any) -> Document | None:
        """One document by id; concurrent look-ups share one query."""
        by_id = self._by_id.get(collection)
        if by_id is None:
            by_id = self._by_id[collection] = Coalescer(partial(self._documents_by_id, collection), LOOKUPS_MAX)
        return await by_id.get(identifier)

    async def _documents_by_id(self, collection: str, identifiers: Iterable[Any]) -> Mapping[Any, Document]:
        found = self.collection(collection).find({"_id": {"$in": list(identifiers)}})
        return {document["_id"]: document for document in await found.to_list(None)}

    async def get(self, aggregate: Aggregate[State], entity_id: int | str) -> Entity[State] | None:
        """The current entity; None if it never existed."""
        document = await self.document(aggregate.collection, entity_id)
        return None if document is None else entity_of(aggregate, document)

    async def require(self, aggregate: Aggregate[State], entity_id: int | str, project_id: int | None) -> Entity[State]:
        """The current entity; raises ``NotFound`` if it is of another project, deleted, or never existed."""
        document = await self.document(aggregate.collection, entity_id)
        if document is None or document["project_id"] != project_id or document["state"].get("deleted"):
            raise NotFound(f"{aggregate.name} {entity_id} does not exist")
        return entity_of(aggregate, document)

    async def find(
        self,
        aggregate: Aggregate[State],
        criteria: Document,
        *,
        sort: Sequence[tuple[str, int]] = (("_id", -1),),
        limit: int = 1000,
        skip: int = 0,
        without: Sequence[str] = (),
    ) -> list[Entity[State]]:
        """Entities by a MongoDB filter on ``project_id`` and ``state.<field>``, newest first by default.

        Args:
            without: large fields that are not read; they have their defaults.
        """
        found = self.collection(aggregate.collection).find(criteria, dict.fromkeys(without, 0) or None)
        cursor = found.sort(list(sort)).skip(skip).limit(limit)
        return [entity_of(aggregate, document) async for document in counted(cursor)]

    async def events_before(
        self, aggregate: Aggregate[Any], entity_id: int | str, version: int, limit: int
    ) -> Sequence[Envelope]:
        """An entity's events below a version, newest first; fewer than ``limit`` if they are large."""
        page = await self._store.read_stream_before(aggregate.stream(entity_id), version, limit)
        note_read(sum(len(event.data_json) for event in page.events))
        return page.events

    async def as_of(self, aggregate: Aggregate[State], entity_id: int | str, moment: datetime) -> Entity[State] | None:
        """The entity as it was at ``moment``, None if it did not exist yet; raises ``NewerVersion``."""
        stream = aggregate.stream(entity_id)
        version = await self._store.version_at(stream, moment)
        if version is None:
            return None
        envelopes = self._store.read_stream(stream, version_max=version)
        return await fold_entity(aggregate, entity_id, version, envelopes)
