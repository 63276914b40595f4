"""Reads of sources and destinations, and of the jobs that use them."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from libs.core.entity import Entity
from libs.eventsourcing.documents import Documents
from libs.mongodb.client import ASCENDING, DESCENDING, Document, IndexModel
from services.catalog.answers import JobOfConnection, job_of_destination, job_of_source
from services.catalog.connections import AGGREGATES
from services.catalog.domain.connection import Connection, Role, name_key
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

Jobs = Mapping[int, Sequence[JobOfConnection]]
"""Jobs by the id of the connection that they use, newest first."""

_OTHER: dict[Role, Role] = {"source": "destination", "destination": "source"}


class CatalogQueries:
    """Reads of the catalog service's database."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents

    async def listed(self, role: Role, project_id: int) -> tuple[list[Entity[Connection]], Jobs]:
        """All of a project, newest first, and its jobs by the id of the connection that they use."""
        living = {"project_id": project_id, "state.deleted": False}
        return await asyncio.gather(
            self._documents.find(AGGREGATES[role], living, limit=CONNECTIONS_LISTED_MAX),
            self._jobs(role, project_id, {}),
        )

    async def jobs_of(self, role: Role, entity: Entity[Connection]) -> Sequence[JobOfConnection]:
        """The jobs that use one, newest first."""
        jobs = await self._jobs(role, entity.state.project_id, {f"{role}_id": entity.id})
        return jobs.get(int(entity.id), ())

    async def named(self, role: Role, project_id: int, name: str) -> Entity[Connection] | None:
        """The living one of this name."""
        criteria = {"keys": name_key(project_id, name), "project_id": project_id}
        found = await self._documents.find(AGGREGATES[role], criteria, limit=1)
        return found[0] if found else None

    async def job(self, project_id: int, job_id: int) -> Document | None:
        """A job of the project, with its saved choice of streams."""
        document = await self._documents.document(JOBS.collection, job_id)
        return document if document is not None and document["project_id"] == project_id else None

    async def reserved_until_before(self, role: Role, moment: datetime, limit: int) -> list[Entity[Connection]]:
        """Those with a reservation that ended before ``moment``, in all projects."""
        criteria = {"state.references": {"$elemMatch": {"reserved_until": {"$lt": moment}}}, "state.deleted": False}
        return await self._documents.find(AGGREGATES[role], criteria, limit=limit)

    async def _jobs(self, role: Role, project_id: int, criteria: Document) -> Jobs:
        other = _OTHER[role]
        found = self._documents.collection(JOBS.collection).find(
            {"project_id": project_id, **criteria}, {"streams_config_json": False}
        )
        jobs = await found.sort("_id", DESCENDING).to_list(None)
        names = await self._names(other, project_id, {job[f"{other}_id"] for job in jobs})
        by_id: dict[int, list[JobOfConnection]] = {}
        for job in jobs:
            named = names.get(job[f"{other}_id"], ("", ""))
            shown = job_of_source(job, named) if role == "source" else job_of_destination(job, named)
            by_id.setdefault(job[f"{role}_id"], []).append(shown)
        return by_id

    async def _names(self, role: Role, project_id: int, ids: Iterable[int]) -> dict[int, tuple[str, str]]:
        found = self._documents.collection(AGGREGATES[role].collection).find(
            {"_id": {"$in": list(ids)}, "project_id": project_id},
            {"state.definition.name": True, "state.definition.type": True},
        )
        definitions = {int(item["_id"]): item["state"]["definition"] async for item in found}
        return {identifier: (item["name"], item["type"]) for identifier, item in definitions.items()}
