"""Reads of jobs and runs, in the words of the project family (seed names and those of OLake's page, side by side)."""

import asyncio
import gzip
import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

import orjson

from libs.contracts.internal import EndpointReserved, StreamProgress
from libs.contracts.runs import StreamResult
from libs.core.clock import Clock, isoformat_z
from libs.core.decider import Aggregate
from libs.core.envelope import Envelope
from libs.core.errors import FieldError, InvalidInput, NotFound
from libs.core.json import JsonObject
from libs.eventsourcing.command_handler import Entity
from libs.eventsourcing.documents import Documents
from libs.eventsourcing.event_store import SideWrite
from libs.mongodb.client import ASCENDING, DESCENDING, Document, IndexModel
from libs.process.read_budget import counted
from services.job_orchestrator.domain.job import JOB, JobState
from services.job_orchestrator.domain.run import RUN, RunState, RunStatus
from services.job_orchestrator.projections import DESTINATIONS, SOURCES
from services.job_orchestrator.readable import Readable
from services.job_orchestrator.run_records import PAGE_LINES_MAX, RunRecords, percent_done

RUNS_LISTED_MAX = 1000
JOBS_VIEWED_TOGETHER = 200
RESERVED = "endpoints_reserved"
RESERVED_INDEXES = [IndexModel([("created_at", ASCENDING)], expireAfterSeconds=24 * 3600)]

Side = Literal["source", "destination"]
_PROJECTIONS = {"source": SOURCES, "destination": DESTINATIONS}
_FAMILY_STATES: dict[RunStatus, str] = {
    "queued": "scheduled",
    "running": "running",
    "completed": "completed",
    "failed": "failed",
    "cancelled": "canceled",
}


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
    ) -> list[JsonObject]:
        """The project's jobs, newest first.

        Args:
            before: only those with a lower id.
            limit: how many at most; 0 for all.
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
        views: list[JsonObject] = []
        for first in range(0, len(jobs), JOBS_VIEWED_TOGETHER):
            page = jobs[first : first + JOBS_VIEWED_TOGETHER]
            views += await self._views(project_id, page, objects=objects)
        return views

    async def job(self, project_id: int, job: Entity[JobState], *, objects: bool) -> JsonObject:
        """One job with everything about it."""
        return (await self._views(project_id, [job], objects=objects))[0]

    async def past_or_present_job(self, project_id: int, job_id: int) -> Entity[JobState]:
        """A job of the project, deleted or not; raises ``NotFound`` when there never was one."""
        job = await self._documents.get(JOB, job_id)
        if job is None or job.state.project_id != project_id:
            raise NotFound(f"job {job_id} does not exist")
        return job

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

    async def history(
        self, aggregate: Aggregate[Any], entity_id: int | str, *, before_version: int, limit: int
    ) -> list[JsonObject]:
        """A job's or a run's events below a version, newest first."""
        events = await self._documents.events_before(aggregate, entity_id, before_version, limit)
        return [event_view(event) for event in events]

    async def _views(self, project_id: int, jobs: Sequence[Entity[JobState]], *, objects: bool) -> list[JsonObject]:
        sources = await self._endpoints("source", project_id, {job.state.definition.source_id for job in jobs})
        destinations = await self._endpoints(
            "destination", project_id, {job.state.definition.destination_id for job in jobs}
        )
        active = {job.state.active_run_id for job in jobs} - {None}
        running = await self._documents.find(
            RUN, {"_id": {"$in": sorted(active, key=str)}, "state.status": "running"}, limit=len(active) or 1
        )
        running_ids = {str(run.id) for run in running}
        return [_job_view(job, sources, destinations, running_ids, objects=objects) for job in jobs]

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

    async def task(self, project_id: int, job_id: int, run_id: str) -> Entity[RunState]:
        """A run of the job; raises ``NotFound`` otherwise."""
        run = await self._documents.require(RUN, run_id, project_id)
        if run.state.job_id != job_id:
            raise NotFound(f"task {run_id} is not one of job {job_id}")
        return run

    async def tasks(self, project_id: int, job_id: int, limit: int, before: str | None = None) -> list[JsonObject]:
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
        )
        return [self.task_view(run) for run in runs]

    def task_view(self, run: Entity[RunState], moment: datetime | None = None) -> JsonObject:
        """A run as lists show it, now or at a moment; a run that waits has the time since when as its start."""
        state = run.state
        start = state.started_at or state.queued_at
        end = state.finished_at or moment or self._clock.now()
        runtime_seconds = max(0, int((end - start).total_seconds())) if state.started_at else 0
        return {
            "id": str(run.id),
            "start_time": isoformat_z(start),
            "runtime": runtime_seconds,
            "status": _FAMILY_STATES[state.status],
            "job_type": state.kind,
            "file_path": file_path(run),
            "attempts": state.attempts,
            "error": state.error,
            "verified": _verified(state),
        }

    async def task_detail(self, run: Entity[RunState]) -> JsonObject:
        """A run with its progress and, once it has ended, its counts per stream."""
        return self._detail(run, await self._records.progress(str(run.id)), None)

    async def task_as_of(self, run: Entity[RunState], moment: datetime) -> JsonObject:
        """A run as it stood at a moment; how far it was then is not kept.

        Raises:
            NotFound: it was not there yet.
        """
        then = await self._documents.as_of(RUN, run.id, moment)
        if then is None:
            raise NotFound(f"task {run.id} did not exist then")
        return self._detail(then, (), moment)

    def _detail(self, run: Entity[RunState], progress: Sequence[StreamProgress], moment: datetime | None) -> JsonObject:
        done = 100 if run.state.status == "completed" else percent_done(progress)
        return self.task_view(run, moment) | {
            "trigger": run.state.trigger,
            "progress": done,
            "cancel_requested": run.state.cancel_requested,
            "streams": _stream_views(progress, run.state.streams),
        }

    async def task_logs(self, run_id: str) -> list[JsonObject]:
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


def file_path(run: Entity[RunState]) -> str:
    """The opaque key by which the page asks for a run's log."""
    return f"jobs/{run.state.job_id}/runs/{run.id}"


def run_id_of(path: str, job_id: int) -> str:
    """The run that a ``file_path`` of this job names; raises ``NotFound`` for any other."""
    prefix, run_id = f"jobs/{job_id}/runs/", path.rsplit("/", 1)[-1]
    if path != prefix + run_id or not run_id:
        raise NotFound(f"file_path is not one of job {job_id}")
    return run_id


def line_view(line: Mapping[str, Any]) -> JsonObject:
    """A log line as answers carry it."""
    return {"level": line["level"], "time": isoformat_z(line["time"]), "message": line["message"]}


def event_view(envelope: Envelope) -> JsonObject:
    """An event as histories show it."""
    return {
        "id": envelope.id,
        "version": envelope.version,
        "type": envelope.type,
        "time": isoformat_z(envelope.time),
        "actor": envelope.metadata.actor,
        "data": orjson.Fragment(envelope.data_json),
    }


def _job_view(
    job: Entity[JobState],
    sources: Mapping[int, Document],
    destinations: Mapping[int, Document],
    running: set[str],
    *,
    objects: bool,
) -> JsonObject:
    state, definition = job.state, job.state.definition
    view: JsonObject = {
        "id": job.id,
        "name": definition.name,
        "source": _endpoint_view(definition.source_id, sources, objects=objects),
        "destination": _endpoint_view(definition.destination_id, destinations, objects=objects),
        "streams_config": json_of(definition.streams_config_json, objects=objects),
        "frequency": definition.frequency,
        "advanced_settings": orjson.Fragment(definition.advanced_settings_json),
        "activate": definition.activate,
        "created_at": isoformat_z(state.created_at),
        "updated_at": isoformat_z(state.updated_at),
        "created_by": state.created_by,
        "updated_by": state.updated_by,
    }
    if (last := state.last_run) is not None:
        status: RunStatus = last.outcome or ("running" if last.run_id in running else "queued")
        view |= {
            "last_run_time": isoformat_z(last.requested_at),
            "last_run_state": _FAMILY_STATES[status],
            "last_run_type": last.kind,
        }
    if state.next_tick is not None:
        view["next_run_time"] = isoformat_z(state.next_tick)
    return view


def _endpoint_view(identifier: int, known: Mapping[int, Document], *, objects: bool) -> JsonObject:
    endpoint = known.get(identifier, {"name": "", "type": "", "version": "", "config_json": "{}"})
    return {
        "id": identifier,
        "name": endpoint["name"],
        "type": endpoint["type"],
        "version": endpoint["version"],
        "config": json_of(endpoint["config_json"], objects=objects),
    }


def json_of(text: str, *, objects: bool) -> Any:
    """JSON text as the string that the page parses or, with ``?expand=config``, as the object itself."""
    return orjson.Fragment(text) if objects else text


_UNREPORTED: JsonObject = {"rows_total": None, "state": "failed", "error": None}


def _stream_views(progress: Sequence[StreamProgress], results: Sequence[StreamResult]) -> list[JsonObject]:
    """Per stream what it came to, or how far it is."""
    views = {(item.namespace, item.name): _progress_view(item) for item in progress}
    for result in results:
        key = (result.namespace, result.name)
        views[key] = _UNREPORTED | views.get(key, {}) | _result_view(result)
    return list(views.values())


def _progress_view(item: StreamProgress) -> JsonObject:
    return item.model_dump() | {"seconds": None, "verified": None, "verification": None, "values_changed": {}}


def _result_view(result: StreamResult) -> JsonObject:
    verification = orjson.Fragment(result.verification_json) if result.verification_json else None
    # Progress tells how a stream whose ends differ ended, for as long as it is kept.
    end = {} if result.verified is False else {"state": "completed", "error": None}
    return result.model_dump(exclude={"verification_json"}) | {
        "verification": verification,
        "values_changed": {changed.column: changed.values for changed in result.values_changed},
        **end,
    }


def _verified(run: RunState) -> bool | None:
    """False if a stream's ends differ, True if the run completed and those of all its streams are equal, else None."""
    verdicts = {result.verified for result in run.streams}
    if False in verdicts:
        return False
    return True if run.status == "completed" and verdicts == {True} else None


def _line_text(line: Mapping[str, Any]) -> bytes:
    return f"{isoformat_z(line['time'])} {str(line['level']).upper():7} {line['message']}\n".encode()


def _archive(name: str, content: bytes, written_at: int) -> bytes:
    tar_bytes = io.BytesIO()
    with tarfile.open(fileobj=tar_bytes, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size, member.mtime = len(content), written_at
        archive.addfile(member, io.BytesIO(content))
    return gzip.compress(tar_bytes.getvalue(), mtime=written_at)
