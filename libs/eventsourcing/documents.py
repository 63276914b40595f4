"""Reads of a service's own documents; look-ups by id that arrive together go out together."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from libs.core.decider import Aggregate
from libs.core.entity import Entity
from libs.core.envelope import Envelope, Frozen
from libs.core.errors import NotFound
from libs.eventsourcing.entities import entity_of, fold_entity
from libs.eventsourcing.event_store import EventStore
from libs.mongodb.client import ClientSession, Collection, Document, SyncCollection
from libs.process.read_budget import counted, note_read

LOOKUPS_MAX = 500

State = TypeVar("State", bound=Frozen)
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads of one moment.

    Args:
        collection: the live collection of a logical name; pass ``session`` to each of its reads.
    """

    collection: Callable[[str], SyncCollection[Document]]
    session: ClientSession


class Documents:
    """Reads the owner's documents; sees every acknowledged command at once.

    Args:
        store: the service's opened store.
    """

    def __init__(self, store: EventStore) -> None:
        self._store = store
        self._lookups: dict[str, _Lookups] = {}

    def collection(self, name: str) -> Collection:
        """The live collection of an aggregate or projection, for queries of one's own; always filter by project."""
        return self._store.database[self._store.live_collection(name)]

    def plain(self, name: str) -> Collection:
        """A collection outside event sourcing: sessions, secrets, leases, logs."""
        return self._store.database[name]

    async def in_snapshot(self, read: Callable[[Reader], Result]) -> Result:
        """Run several reads on one moment, which holds every acknowledged command.

        Args:
            read: plain blocking code; it runs on a thread, which costs one hop whatever the number of its reads.
        """
        return await asyncio.to_thread(self._read, read)

    def _read(self, read: Callable[[Reader], Result]) -> Result:
        database = self._store.sync_database
        with database.client.start_session(snapshot=True) as session:
            return read(Reader(lambda name: database[self._store.live_collection(name)], session))

    async def document(self, collection: str, identifier: Any) -> Document | None:
        """One document by id; concurrent look-ups share one query."""
        lookups = self._lookups.get(collection)
        if lookups is None:
            lookups = self._lookups[collection] = _Lookups(self, collection)
        return await lookups.get(identifier)

    async def get(self, aggregate: Aggregate[State], entity_id: int | str) -> Entity[State] | None:
        """An entity as it stands, None when there never was one."""
        document = await self.document(aggregate.collection, entity_id)
        return None if document is None else entity_of(aggregate, document)

    async def require(self, aggregate: Aggregate[State], entity_id: int | str, project_id: int | None) -> Entity[State]:
        """An entity of this project that is not deleted; raises ``NotFound`` otherwise."""
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
    ) -> list[Entity[State]]:
        """Entities by a MongoDB filter on ``project_id`` and ``state.<field>``, newest first unless told."""
        cursor = self.collection(aggregate.collection).find(criteria).sort(list(sort)).skip(skip).limit(limit)
        return [entity_of(aggregate, document) async for document in counted(cursor)]

    async def events_before(
        self, aggregate: Aggregate[Any], entity_id: int | str, version: int, limit: int
    ) -> Sequence[Envelope]:
        """An entity's events below a version, newest first; fewer than ``limit`` if they are large."""
        page = await self._store.read_stream_before(aggregate.stream(entity_id), version, limit)
        note_read(sum(len(event.data_json) for event in page.events))
        return page.events

    async def as_of(self, aggregate: Aggregate[State], entity_id: int | str, moment: datetime) -> Entity[State] | None:
        """The entity as it stood at ``moment``, None when it was not there yet; raises ``NewerVersion``."""
        stream = aggregate.stream(entity_id)
        version = await self._store.version_at(stream, moment)
        if version is None:
            return None
        envelopes = self._store.read_stream(stream, version_max=version)
        return await fold_entity(aggregate, entity_id, version, envelopes)


class _Lookups:
    """Collects look-ups of one collection while a query is in flight."""

    def __init__(self, documents: Documents, name: str) -> None:
        self._documents = documents
        self._name = name
        self._waiting: dict[Any, list[asyncio.Future[Document | None]]] = {}
        self._task: asyncio.Task[None] | None = None

    async def get(self, identifier: Any) -> Document | None:
        future: asyncio.Future[Document | None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(identifier, []).append(future)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch = {key: self._waiting.pop(key) for key in list(self._waiting)[:LOOKUPS_MAX]}
                await self._answer(batch)
        finally:
            self._task = None

    async def _answer(self, batch: dict[Any, list["asyncio.Future[Document | None]"]]) -> None:
        try:
            cursor = self._documents.collection(self._name).find({"_id": {"$in": list(batch)}})
            found = {document["_id"]: document for document in await cursor.to_list(None)}
        except BaseException as error:
            for future in (future for futures in batch.values() for future in futures):
                if not future.done():
                    future.set_exception(error)
            if not isinstance(error, Exception):
                raise
            return
        for key, futures in batch.items():
            for future in futures:
                if not future.done():
                    future.set_result(found.get(key))
