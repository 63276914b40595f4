"""Reads of sources and destinations, with the jobs that use them, as the API shows them."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import orjson

from libs.core.clock import isoformat_z
from libs.core.envelope import Envelope
from libs.core.errors import NotFound
from libs.core.json import JsonObject
from libs.eventsourcing.command_handler import Entity
from libs.eventsourcing.documents import Documents
from libs.mongodb.client import ASCENDING, DESCENDING, Document, IndexModel
from services.catalog.connections import AGGREGATES
from services.catalog.domain.connection import Connection, Definition, Role, name_key
from services.catalog.projections import JOBS

CONNECTIONS_LISTED_MAX = 10_000

_CONNECTION_INDEXES = [
    IndexModel([("project_id", ASCENDING), ("_id", DESCENDING)]),
    IndexModel([("state.references.reserved_until", ASCENDING)]),
]
INDEXES = {
    "sources": _CONNECTION_INDEXES,
    "destinations": _CONNECTION_INDEXES,
    JOBS.collection: [
        IndexModel([("project_id", ASCENDING), ("source_id", ASCENDING)]),
        IndexModel([("project_id", ASCENDING), ("destination_id", ASCENDING)]),
    ],
    "secrets": [IndexModel([("key_id", ASCENDING)])],
}

_OTHER: dict[Role, Role] = {"source": "destination", "destination": "source"}


class CatalogQueries:
    """What the catalog service asks its own database."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents

    async def listed(self, role: Role, project_id: int, *, objects: bool) -> list[JsonObject]:
        """All of a project with their jobs, newest first; ``objects`` gives configurations as objects."""
        living = {"project_id": project_id, "state.deleted": False}
        entities, jobs = await asyncio.gather(
            self._documents.find(AGGREGATES[role], living, limit=CONNECTIONS_LISTED_MAX),
            self._jobs(role, project_id, {}),
        )
        return [_view(entity, jobs.get(int(entity.id), ()), objects=objects) for entity in entities]

    async def shown(self, role: Role, entity: Entity[Connection], *, objects: bool) -> JsonObject:
        """One with its jobs."""
        jobs = await self._jobs(role, entity.state.project_id, {f"{role}_id": entity.id})
        return _view(entity, jobs.get(int(entity.id), ()), objects=objects)

    async def shown_as_of(
        self, role: Role, entity_id: int, project_id: int, moment: datetime, *, objects: bool
    ) -> JsonObject:
        """One as it stood at a moment, without its jobs, whose history another service keeps."""
        entity = await self._documents.as_of(AGGREGATES[role], entity_id, moment)
        if entity is None or entity.state.project_id != project_id or entity.state.deleted:
            raise NotFound(f"{role} {entity_id} did not exist then")
        return _view(entity, None, objects=objects)

    async def named(self, role: Role, project_id: int, name: str) -> Entity[Connection] | None:
        """The living one of this name."""
        criteria = {"keys": name_key(project_id, name), "project_id": project_id}
        found = await self._documents.find(AGGREGATES[role], criteria, limit=1)
        return found[0] if found else None

    async def history(
        self, role: Role, entity_id: int, project_id: int, *, before_version: int, limit: int
    ) -> list[JsonObject]:
        """Its events below a version, newest first; a deleted one still has its history."""
        document = await self._documents.document(AGGREGATES[role].collection, entity_id)
        if document is None or document["project_id"] != project_id:
            raise NotFound(f"{role} {entity_id} does not exist")
        events = await self._documents.events_before(AGGREGATES[role], entity_id, before_version, limit)
        return [_event_view(event) for event in events]

    async def job(self, project_id: int, job_id: int) -> Document | None:
        """A job of the project, with its saved choice of streams."""
        document = await self._documents.document(JOBS.collection, job_id)
        return document if document is not None and document["project_id"] == project_id else None

    async def reserved_until_before(self, role: Role, moment: datetime, limit: int) -> list[Entity[Connection]]:
        """Those with a reservation that ended before ``moment``, in all projects."""
        criteria = {"state.references": {"$elemMatch": {"reserved_until": {"$lt": moment}}}, "state.deleted": False}
        return await self._documents.find(AGGREGATES[role], criteria, limit=limit)

    async def _jobs(self, role: Role, project_id: int, criteria: Document) -> Mapping[int, Sequence[JsonObject]]:
        """The jobs by the id of the connection that they use, newest first."""
        other = _OTHER[role]
        found = self._documents.collection(JOBS.collection).find(
            {"project_id": project_id, **criteria}, {"streams_config_json": False}
        )
        jobs = await found.sort("_id", DESCENDING).to_list(None)
        names = await self._names(other, project_id, {job[f"{other}_id"] for job in jobs})
        by_id: dict[int, list[JsonObject]] = {}
        for job in jobs:
            by_id.setdefault(job[f"{role}_id"], []).append(
                _job_view(job, other, names.get(job[f"{other}_id"], ("", "")))
            )
        return by_id

    async def _names(self, role: Role, project_id: int, ids: Iterable[int]) -> dict[int, tuple[str, str]]:
        found = self._documents.collection(AGGREGATES[role].collection).find(
            {"_id": {"$in": list(ids)}, "project_id": project_id},
            {"state.definition.name": True, "state.definition.type": True},
        )
        definitions = {int(item["_id"]): item["state"]["definition"] async for item in found}
        return {identifier: (item["name"], item["type"]) for identifier, item in definitions.items()}


def config_view(definition: Definition, *, objects: bool) -> Any:
    """The configuration, secrets masked: a text that holds JSON, which OLake's page parses, or the object."""
    return orjson.Fragment(definition.config_json) if objects else definition.config_json


def _view(entity: Entity[Connection], jobs: Sequence[JsonObject] | None, *, objects: bool) -> JsonObject:
    state, definition = entity.state, entity.state.definition
    view: JsonObject = {
        "id": entity.id,
        "name": definition.name,
        "type": definition.type,
        "version": definition.version,
        "config": config_view(definition, objects=objects),
        "created_at": isoformat_z(state.created_at),
        "updated_at": isoformat_z(state.updated_at),
        "created_by": state.created_by,
        "updated_by": state.updated_by,
    }
    return view if jobs is None else {**view, "jobs": jobs}


def _job_view(job: Document, other: Role, named: tuple[str, str]) -> JsonObject:
    name, kind = named
    view: JsonObject = {
        "id": job["_id"],
        "name": job["name"],
        "activate": job["activate"],
        "last_run_state": job["last_run_state"],
        f"{other}_name": name,
        f"{other}_type": kind,
    }
    if other == "destination":
        view["dest_name"] = name
    if job["last_run_time"] is not None:
        view["last_run_time"] = isoformat_z(job["last_run_time"])
    return view


def _event_view(envelope: Envelope) -> JsonObject:
    data = envelope.data.model_dump(mode="json", exclude={"secret_ref"})
    if "config_json" in data:
        data["config"] = orjson.Fragment(data.pop("config_json"))
    return {
        "id": envelope.id,
        "version": envelope.version,
        "type": envelope.type,
        "time": isoformat_z(envelope.time),
        "actor": envelope.metadata.actor,
        "data": data,
    }
