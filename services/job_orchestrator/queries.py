"""Reads of jobs and runs, in the words of the project family (seed names and those of OLake's page, side by side)."""

import asyncio
import gzip
import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from libs.contracts.internal import EndpointReserved
from libs.core.clock import Clock, isoformat_z
from libs.core.entity import Entity
from libs.core.errors import FieldError, InvalidInput
from libs.eventsourcing.batch import SideWrite
from libs.eventsourcing.documents import Documents
from libs.mongodb.client import ASCENDING, DESCENDING, Document, IndexModel
from libs.process.read_budget import counted
from services.job_orchestrator.answers import (
    JobListed,
    JobShown,
    JobStateShown,
    LogLineShown,
    TaskDetail,
    TaskShown,
    job_state_view,
    job_view,
    line_view,
    summary_of,
    task_detail,
    task_view,
)
from services.job_orchestrator.domain.job import JOB, JobState
from services.job_orchestrator.domain.run import RUN, RunState
from services.job_orchestrator.projections import DESTINATIONS, SOURCES
from services.job_orchestrator.readable import Readable
from services.job_orchestrator.run_records import PAGE_LINES_MAX, RunRecords
from services.job_orchestrator.stream_states import states_of

RUNS_LISTED_MAX = 1000
JOBS_VIEWED_TOGETHER = 200
RESERVED = "endpoints_reserved"
RESERVED_INDEXES = [IndexModel([("created_at", ASCENDING)], expireAfterSeconds=24 * 3600)]

# Large parts of a run that lists do not show.
_NOT_LISTED = ("state.streams_config_json", "state.streams.verification_json", "state.streams.values_changed")

Side = Literal["source", "destination"]
_PROJECTIONS = {"source": SOURCES, "destination": DESTINATIONS}


def reserved_endpoint(side: Side, project_id: int, endpoint: EndpointReserved, now: datetime) -> SideWrite:
    """What catalog said about an endpoint, kept until its event arrives, so that a new job shows whole objects."""
    document = endpoint.model_dump(exclude={"id"}) | {"project_id": project_id, "created_at": now}
    return SideWrite(RESERVED, f"{side}-{endpoint.id}", document)


class JobQueries:
    """Everything that the routes read; each call is for one project."""

    def __init__(self, documents: Documents, records: RunRecords, clock: Clock) -> None:
        self._documents = documents
        self._records = records
        self._clock = clock
        self._readable = Readable(JOB)

    # Jobs

    async def jobs(
        self,
        project_id: int,
        *,
        source_id: int | None,
        destination_id: int | None,
        objects: bool,
        before: int | None = None,
        limit: int = 0,
        summary: bool = False,
    ) -> list[JobListed]:
        """The project's jobs, newest first.

        Args:
            before: only those with a lower id.
            limit: how many at most; 0 for all.
            summary: leave out configurations and stream catalogs.
        """
        criteria: Document = {"project_id": project_id, "state.deleted": False}
        if source_id is not None:
            criteria["state.definition.source_id"] = source_id
        if destination_id is not None:
            criteria["state.definition.destination_id"] = destination_id
        if before is not None:
            criteria["_id"] = {"$lt": before}
        cursor = self._documents.collection(JOB.collection).find(criteria).sort("_id", DESCENDING).limit(limit)
        jobs = [job async for job in self._readable.entities(counted(cursor))]
        views: list[JobListed] = []
        for first in range(0, len(jobs), JOBS_VIEWED_TOGETHER):
            page = jobs[first : first + JOBS_VIEWED_TOGETHER]
            shown = await self._views(project_id, page, objects=objects)
            views += [summary_of(job) for job in shown] if summary else shown
        return views

    async def job(self, project_id: int, job: Entity[JobState], *, objects: bool) -> JobShown:
        """One job with everything about it."""
        return (await self._views(project_id, [job], objects=objects))[0]

    async def job_named(self, project_id: int, name: str) -> int | None:
        """The id of the project's living job of that name."""
        jobs = self._documents.collection(JOB.collection)
        found = await jobs.find_one({"keys": f"{project_id}/{name}"}, {"_id": 1})
        return int(found["_id"]) if found else None

    async def endpoint_named(self, side: Side, project_id: int, name: str) -> int | None:
        """The id of the project's source or destination of that name."""
        found = await self._documents.collection(_PROJECTIONS[side].collection).find_one(
            {"project_id": project_id, "name": name, "deleted": False}, {"_id": 1}
        )
        return int(found["_id"]) if found else None

    async def endpoint_types(self, project_id: int, source_id: int, destination_id: int) -> tuple[str, str] | None:
        """The types of a source and a destination, None if one of them is not known yet."""
        sources = await self._endpoints("source", project_id, {source_id})
        destinations = await self._endpoints("destination", project_id, {destination_id})
        if source_id not in sources or destination_id not in destinations:
            return None
        return sources[source_id]["type"], destinations[destination_id]["type"]

    async def job_state(self, job: Entity[JobState]) -> JobStateShown:
        """How far the job's streams have been read."""
        return job_state_view(job, await states_of(self._documents, int(job.id)))

    async def _views(self, project_id: int, jobs: Sequence[Entity[JobState]], *, objects: bool) -> list[JobShown]:
        sources = await self._endpoints("source", project_id, {job.state.definition.source_id for job in jobs})
        destinations = await self._endpoints(
            "destination", project_id, {job.state.definition.destination_id for job in jobs}
        )
        active = {job.state.active_run_id for job in jobs} - {None}
        running = await self._documents.find(
            RUN, {"_id": {"$in": sorted(active, key=str)}, "state.status": "running"}, limit=len(active) or 1
        )
        running_ids = {str(run.id) for run in running}
        return [job_view(job, sources, destinations, running_ids, objects=objects) for job in jobs]

    async def _endpoints(self, side: Side, project_id: int, wanted: Iterable[int]) -> dict[int, Document]:
        """Sources or destinations by id; one whose event has not arrived yet as catalog reserved it."""
        missing = set(wanted)
        cursor = self._documents.collection(_PROJECTIONS[side].collection).find(
            {"_id": {"$in": list(missing)}, "project_id": project_id}
        )
        found = {int(document["_id"]): document async for document in cursor}
        missing -= found.keys()
        if missing:
            keys = [f"{side}-{identifier}" for identifier in missing]
            reserved = self._documents.plain(RESERVED).find({"_id": {"$in": keys}, "project_id": project_id})
            async for document in reserved:
                found[int(document["_id"].split("-")[1])] = document
        return found

    # Tasks

    async def tasks(self, project_id: int, job_id: int, limit: int, before: str | None = None) -> list[TaskShown]:
        """The job's runs, newest first.

        Args:
            before: only those that began to wait before this one.

        Raises:
            InvalidInput: the run ``before`` is not one of the job.
        """
        criteria: Document = {"project_id": project_id, "state.job_id": job_id}
        if before is not None:
            last = await self._documents.document(RUN.collection, before)
            if last is None or last["project_id"] != project_id or last["state"]["job_id"] != job_id:
                message = "is not the id of a task of this job"
                raise InvalidInput(f"before: {message}", errors=[FieldError("before", message)])
            queued_at = last["state"]["queued_at"]
            same_moment = {"state.queued_at": queued_at, "_id": {"$lt": before}}
            criteria["$or"] = [{"state.queued_at": {"$lt": queued_at}}, same_moment]
        runs = await self._documents.find(
            RUN,
            criteria,
            sort=[("state.queued_at", -1), ("_id", -1)],
            limit=limit,
            without=_NOT_LISTED,
        )
        return [task_view(run, self._clock.now()) for run in runs]

    async def task(self, run: Entity[RunState]) -> TaskDetail:
        """A run with its progress."""
        return task_detail(run, await self._records.progress(str(run.id)), self._clock.now())

    async def task_logs(self, run_id: str) -> list[LogLineShown]:
        """The last ``PAGE_LINES_MAX`` lines of a run's log, oldest first."""
        page = await self._records.page(run_id, -1, PAGE_LINES_MAX)
        return [line_view(line) for line in page.lines]

    async def log_archive(self, run: Entity[RunState]) -> bytes:
        """The whole log as a tar.gz; the same bytes for the same lines, so that ranges of it fit together."""
        written_at = int((run.state.finished_at or run.state.queued_at).timestamp())
        text = io.BytesIO()
        cursor, more = 0, True
        while more:
            page = await self._records.page(str(run.id), cursor, PAGE_LINES_MAX, newer=True)
            text.writelines(_line_text(line) for line in page.lines)
            cursor, more = page.newer_cursor, page.has_more_newer
        return await asyncio.to_thread(_archive, f"run-{run.id}.log", text.getvalue(), written_at)


def _line_text(line: Mapping[str, Any]) -> bytes:
    return f"{isoformat_z(line['time'])} {str(line['level']).upper():7} {line['message']}\n".encode()


def _archive(name: str, content: bytes, written_at: int) -> bytes:
    tar_bytes = io.BytesIO()
    with tarfile.open(fileobj=tar_bytes, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size, member.mtime = len(content), written_at
        archive.addfile(member, io.BytesIO(content))
    return gzip.compress(tar_bytes.getvalue(), mtime=written_at)
