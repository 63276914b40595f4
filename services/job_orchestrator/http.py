"""The routes: jobs, their tasks and logs, settings; and the internal calls of workers and catalog."""

import contextlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from libs.contracts import internal
from libs.contracts.streams import AdvancedSettings, StreamsConfig, difference, parse_streams_config
from libs.core.addresses import IPNetwork, outbound_fault
from libs.core.clock import Clock
from libs.core.errors import Conflict, FieldError, InvalidInput, NotFound
from libs.core.json import JsonObject, parse_json
from libs.core.text import number_of
from libs.core.validation import PastMoment
from libs.eventsourcing.command_handler import CommandHandler, Entity
from libs.eventsourcing.documents import Documents
from libs.web.answers import EventShown, success
from libs.web.conditions import if_match_of
from libs.web.internal import internal_route
from libs.web.openapi import Content, ReadAs, describe
from libs.web.requests import idempotency_of, metadata_of, project_of, read_body, read_query
from services.job_orchestrator.answers import (
    ActivationEchoed,
    Cancelled,
    Clearing,
    JobDeleted,
    JobEchoed,
    JobNameIsFree,
    JobShown,
    LogPage,
    RunBegun,
    SettingsShown,
    StreamsDiffer,
    TaskDetail,
    TaskLogs,
    TaskShown,
)
from services.job_orchestrator.claims import Claims
from services.job_orchestrator.domain.job import JOB, JobState, SetActivation
from services.job_orchestrator.domain.run import RUN, RunState
from services.job_orchestrator.domain.schedule import FREQUENCY_LENGTH_MAX, parse_frequency
from services.job_orchestrator.domain.streams import advanced_settings_text, catalog_of, supported_catalog_text
from services.job_orchestrator.job_writing import EndpointGiven, JobGiven, JobWriting, name_taken
from services.job_orchestrator.queries import RUNS_LISTED_MAX, JobQueries, Side, line_view, run_id_of
from services.job_orchestrator.run_control import CancelledRun, RunControl
from services.job_orchestrator.run_records import PAGE_LINES_MAX, RunRecords
from services.job_orchestrator.workers import Workers

PROJECT = "/api/v1/project/{projectid}"
JOBS = f"{PROJECT}/jobs"
ID_MAX = 2**53
NAME_LENGTH_MAX = 255
HISTORY_EVENTS_MAX = 1000
JOBS_LISTED_MAX = 1000
SETTINGS = "project_settings"


def _canonical_name(name: str) -> str:
    """Composed (Unicode NFC) and trimmed, so that names that look equal are equal."""
    cleaned = unicodedata.normalize("NFC", name).strip()
    if not 1 <= len(cleaned) <= NAME_LENGTH_MAX:
        raise ValueError(f"must be 1 to {NAME_LENGTH_MAX} characters")
    if not cleaned.isprintable():
        raise ValueError("must not contain control characters")
    return cleaned


Name = Annotated[str, AfterValidator(_canonical_name), Field(examples=["shop to lake"])]
Id = Annotated[int, Field(ge=1, le=ID_MAX)]
IdText = Annotated[str, Field(min_length=1, description="The id, with or without quotes.", examples=["1"])]

_CATALOG = {"selected_streams": {"public": [{"stream_name": "orders"}]}, "streams": []}
_ABOUT_ITS_RUN: Mapping[CancelledRun, str] = {
    None: "",
    "cancelled": "; its run was cancelled",
    "being cancelled": "; its run is being cancelled",
}
_describe = partial(describe, tag="Jobs", path={"id": Id})


class Body(BaseModel):
    """A body of the project family: what it does not know it does not mind, and gives back in its echo."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, hide_input_in_errors=True)


class EndpointBody(Body):
    """An id uses what is there and ignores the rest; without one it is created."""

    id: Id | None = None
    name: Name | None = None
    type: str | None = Field(default=None, max_length=64)
    version: str | None = Field(default=None, max_length=64)
    config: Any = None

    def given(self) -> EndpointGiven:
        return EndpointGiven(self.id, self.name, self.type, self.version, self.config)


class JobBody(Body):
    name: Name
    source: EndpointBody = Field(examples=[{"id": 1}])
    destination: EndpointBody = Field(examples=[{"id": 1}])
    streams_config: Annotated[Any, ReadAs(StreamsConfig | str)] = Field(
        description="The streams to move: an object, or a string that holds it as JSON.", examples=[_CATALOG]
    )
    frequency: Annotated[str, StringConstraints(max_length=FREQUENCY_LENGTH_MAX)] | None = Field(
        default="",
        description="When the job runs, in UTC: five cron fields (`30 2 * * 1-5`), `@hourly`, `@daily`, `@weekly`, "
        "`@monthly` or `@yearly`, `every 15 minutes` or `every 2 hours`; empty for a job that is started by hand.",
        examples=["@hourly"],
    )
    advanced_settings: Annotated[Any, ReadAs(AdvancedSettings | str | None)] = Field(
        default=None,
        description="An object, or a string that holds it as JSON.",
        examples=[{"verify": True}],
    )
    activate: bool | None = None

    def given(self, *, activate: bool) -> JobGiven:
        """The checked job; ``activate`` is what holds when the body does not say."""
        return JobGiven(
            name=self.name,
            source=self.source.given(),
            destination=self.destination.given(),
            frequency=parse_frequency(self.frequency or ""),
            streams_config_json=supported_catalog_text(self.streams_config),
            advanced_settings_json=advanced_settings_text(self.advanced_settings),
            activate=activate if self.activate is None else self.activate,
        )


class JobChangeBody(JobBody):
    difference_streams: Annotated[Any, ReadAs(StreamsConfig | str | None)] = Field(
        default=None, description="What `stream-difference` answered: streams to clear before the next sync."
    )

    def streams_to_clear(self) -> str | None:
        if self.difference_streams in (None, ""):
            return None
        text, catalog = catalog_of(self.difference_streams, "difference_streams")
        return text if catalog.selections else None


class ActivationBody(Body):
    activate: bool


class LogsBody(Body):
    file_path: str = Field(min_length=1, max_length=512, examples=["jobs/1/runs/01980f0a-7c1e-7d54-9f2b-1f2e5a7c9d10"])


class StreamsChoiceBody(Body):
    updated_streams_config: Annotated[Any, ReadAs(StreamsConfig | str)] = Field(examples=[_CATALOG])


class JobNameBody(Body):
    name: Name
    entity_type: Literal["source", "destination", "job"]


class SettingsBody(Body):
    webhook_alert_url: Annotated[str, StringConstraints(max_length=2048)]


class Query(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class JobsQuery(Query):
    """``before``: only jobs with a lower id; ``limit``: all when left out."""

    before: Id | None = None
    limit: int | None = Field(default=None, ge=1, le=JOBS_LISTED_MAX)
    source_id: Id | None = None
    dest_id: Id | None = None
    expand: Literal["config"] | None = None


class JobQuery(Query):
    as_of: PastMoment | None = None
    expand: Literal["config"] | None = None


class TaskQuery(Query):
    as_of: PastMoment | None = None


class TasksQuery(Query):
    """``before``: the last task of the page before."""

    before: str | None = Field(default=None, min_length=1, max_length=64)
    limit: int = Field(default=RUNS_LISTED_MAX, ge=1, le=RUNS_LISTED_MAX)


class LogsQuery(Query):
    cursor: int = Field(default=-1, ge=-1, le=ID_MAX)
    limit: int = Field(default=1000, ge=1, le=PAGE_LINES_MAX)
    direction: Literal["older", "newer"] = "older"


class DownloadQuery(Query):
    file_path: str = Field(min_length=1, max_length=512)


class HistoryQuery(Query):
    before: int = Field(default=ID_MAX, ge=1, le=ID_MAX)
    limit: int = Field(default=100, ge=1, le=HISTORY_EVENTS_MAX)


@dataclass(frozen=True, slots=True)
class JobRoutes:
    """The handlers of a project's jobs."""

    documents: Documents
    commands: CommandHandler
    queries: JobQueries
    writing: JobWriting
    control: RunControl

    def routes(self) -> Sequence[web.RouteDef]:
        one = f"{JOBS}/{{id:\\d+}}"
        create = partial(_describe, answer=JobEchoed, versioned=True)
        listing = partial(_describe, answer=list[JobShown])
        act = partial(_describe, idempotent=True, refuses=(409,))
        by_source, by_destination = (f"{JOBS}/{name}_id={{{name}_id:.*}}" for name in ("source", "dest"))
        return [
            create(web.post(JOBS, self.create), "Create a job", body=JobBody, idempotent=True),
            listing(web.get(JOBS, self.list), "List the jobs", query=JobsQuery),
            listing(web.get(by_source, self.list), "List the jobs of a source", path={"source_id": IdText}),
            listing(web.get(by_destination, self.list), "List the jobs of a destination", path={"dest_id": IdText}),
            _describe(web.get(one, self.get), "Fetch a job", query=JobQuery, answer=JobShown, versioned=True),
            create(web.put(one, self.update), "Change a job", body=JobChangeBody, conditional=True, refuses=(409,)),
            _describe(web.delete(one, self.delete), "Delete a job", answer=JobDeleted, conditional=True),
            _describe(
                web.get(f"{one}/history", self.history),
                "The history of a job",
                query=HistoryQuery,
                answer=list[EventShown],
            ),
            act(
                web.post(f"{one}/activate", self.activate),
                "Pause or resume a job",
                body=ActivationBody,
                answer=ActivationEchoed,
                conditional=True,
            ),
            act(web.post(f"{one}/sync", self.sync), "Run a job now", answer=RunBegun),
            _describe(
                web.get(f"{one}/cancel", self.cancel),
                "Cancel a job's run",
                answer=Cancelled,
                refuses=(409,),
                changes=True,
            ),
            act(web.post(f"{one}/cancel", self.cancel), "Cancel a job's run", answer=Cancelled),
            _describe(
                web.get(f"{one}/clear-destination", self.clearing),
                "Ask whether a job's destination is being cleared",
                answer=Clearing,
            ),
            act(web.post(f"{one}/clear-destination", self.clear), "Clear a job's destination", answer=RunBegun),
            _describe(
                web.post(f"{one}/stream-difference", self.stream_difference),
                "Which streams another choice would clear",
                body=StreamsChoiceBody,
                answer=StreamsDiffer,
            ),
            describe(
                web.post(f"{PROJECT}/check-unique", self.check_unique),
                "Ask whether a name is free",
                tag="Project",
                body=JobNameBody,
                answer=JobNameIsFree,
                refuses=(409,),
            ),
        ]

    async def create(self, request: web.Request) -> web.StreamResponse:
        project_id = project_of(request)
        body = await read_body(request, JobBody)
        given = body.given(activate=True)
        job = await self.writing.create(project_id, given, metadata_of(request), idempotency_of(request))
        return await self._echo(job, body, f"job {given.name} created")

    async def list(self, request: web.Request) -> web.StreamResponse:
        project_id = project_of(request)
        query = _filter_of(request) or read_query(request, JobsQuery)
        jobs = await self.queries.jobs(
            project_id,
            source_id=query.source_id,
            destination_id=query.dest_id,
            objects=query.expand is not None,
            before=query.before,
            limit=query.limit or 0,
        )
        return success(jobs)

    async def get(self, request: web.Request) -> web.StreamResponse:
        project_id = project_of(request)
        query = read_query(request, JobQuery)
        if query.as_of is None:
            job = await self._job(request)
        else:
            job = await self._as_of(await self.queries.past_or_present_job(project_id, path_id(request)), query.as_of)
        view = await self.queries.job(project_id, job, objects=query.expand is not None)
        return success(view, etag=job.version, embeds_others=True)

    async def update(self, request: web.Request) -> web.StreamResponse:
        job = await self._job(request)
        body = await read_body(request, JobChangeBody)
        given, clear = body.given(activate=job.state.definition.activate), body.streams_to_clear()
        metadata = metadata_of(request)
        changed = await self.writing.update(job, given, clear, metadata, expected_version=if_match_of(request))
        if clear is not None and changed.state.active_run_id is not None:
            with contextlib.suppress(Conflict):
                await self.control.cancel(changed, metadata)
        self.control.changed()
        return await self._echo(changed, body, f"job {given.name} updated")

    async def delete(self, request: web.Request) -> web.StreamResponse:
        job = await self._job(request)
        run = await self.control.delete(job, metadata_of(request), expected_version=if_match_of(request))
        name = job.state.definition.name
        return success({"name": name}, message=f"job {name} deleted{_ABOUT_ITS_RUN[run]}")

    async def history(self, request: web.Request) -> web.StreamResponse:
        query = read_query(request, HistoryQuery)
        job = await self.queries.past_or_present_job(project_of(request), path_id(request))
        return success(await self.queries.history(JOB, job.id, before_version=query.before, limit=query.limit))

    async def activate(self, request: web.Request) -> web.StreamResponse:
        job = await self._job(request)
        body = await read_body(request, ActivationBody)
        await self.commands.handle(
            JOB,
            job.id,
            SetActivation(activate=body.activate),
            metadata_of(request),
            expected_version=if_match_of(request),
            idempotency=idempotency_of(request),
        )
        self.control.changed()
        verb = "resumed" if body.activate else "paused"
        return success(body.model_dump(), message=f"job {job.state.definition.name} {verb}")

    async def sync(self, request: web.Request) -> web.StreamResponse:
        return await self._begin(request, "sync", "sync started")

    async def clear(self, request: web.Request) -> web.StreamResponse:
        return await self._begin(request, "clear", "clearing the destination started")

    async def clearing(self, request: web.Request) -> web.StreamResponse:
        job = await self._job(request)
        return success({"running": job.state.is_clearing})

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        job = await self._job(request)
        ended = await self.control.cancel(job, metadata_of(request), idempotency=idempotency_of(request))
        message = "the run is cancelled" if ended else "the run is being cancelled"
        return success({"message": message}, message=message)

    async def stream_difference(self, request: web.Request) -> web.StreamResponse:
        job = await self._job(request)
        body = await read_body(request, StreamsChoiceBody)
        _, after = catalog_of(body.updated_streams_config, "updated_streams_config")
        found = difference(parse_streams_config(job.state.definition.streams_config_json), after)
        return success({"difference_streams": found.model_dump(exclude_unset=True) if found.selections else {}})

    async def check_unique(self, request: web.Request) -> web.StreamResponse:
        project_id = project_of(request)
        body = await read_body(request, JobNameBody)
        if body.entity_type == "job":
            if await self.queries.job_named(project_id, body.name) is not None:
                raise name_taken()
        elif await self.queries.endpoint_named(body.entity_type, project_id, body.name) is not None:
            message = f"a {body.entity_type} of this name exists in the project"
            raise Conflict(message, code="already_exists", errors=[FieldError("name", message, "taken")])
        return success({"unique": True})

    async def _begin(self, request: web.Request, kind: Literal["sync", "clear"], message: str) -> web.StreamResponse:
        job = await self._job(request)
        run_id = await self.control.begin(
            int(job.id), kind, "manual", metadata_of(request), idempotency=idempotency_of(request)
        )
        return success({"task_id": run_id, "message": message}, message=message)

    async def _job(self, request: web.Request) -> Entity[JobState]:
        return await self.documents.require(JOB, path_id(request), project_of(request))

    async def _as_of(self, job: Entity[JobState], moment: datetime) -> Entity[JobState]:
        before = await self.documents.as_of(JOB, job.id, moment)
        if before is None or before.state.deleted:
            raise NotFound(f"job {job.id} did not exist then")
        return before

    async def _echo(self, job: Entity[JobState], body: JobBody, message: str) -> web.StreamResponse:
        """What was sent and the id; each ``config`` as catalog keeps it, its secrets replaced by references."""
        view = await self.queries.job(job.state.project_id, job, objects=False)
        echo = body.model_dump(exclude_unset=True)
        sides: tuple[Side, ...] = ("source", "destination")
        for side in sides:
            if "config" in echo[side]:
                masked = view[side]["config"]
                as_text = isinstance(echo[side]["config"], str)
                echo[side]["config"] = masked if as_text else parse_json(masked.encode())
        return success(echo | {"id": job.id}, message=message, etag=job.version)


@dataclass(frozen=True, slots=True)
class TaskRoutes:
    """The handlers of a job's tasks (its runs) and their logs; those of a deleted job stay readable."""

    queries: JobQueries
    records: RunRecords

    def routes(self) -> Sequence[web.RouteDef]:
        one = f"{JOBS}/{{id:\\d+}}"
        archive = Content("The log as a tar.gz", bytes, "application/gzip", ("Content-Disposition",))
        a_part = Content("The range that was asked for", bytes, "application/gzip", ("Content-Range",))
        described = partial(_describe, tag="Tasks")
        return [
            described(
                web.get(f"{one}/tasks", self.list), "List a job's runs", query=TasksQuery, answer=list[TaskShown]
            ),
            described(
                web.get(f"{one}/tasks/{{taskid}}", self.get),
                "Fetch a run",
                query=TaskQuery,
                answer=TaskDetail,
                versioned=True,
            ),
            described(
                web.get(f"{one}/tasks/{{taskid}}/history", self.history),
                "The history of a run",
                query=HistoryQuery,
                answer=list[EventShown],
            ),
            described(
                web.post(f"{one}/tasks/{{taskid}}/logs", self.page),
                "Page through a run's log",
                query=LogsQuery,
                body=LogsBody,
                answer=LogPage,
            ),
            described(web.get(f"{one}/task/{{taskid}}/logs", self.logs), "A run's log", answer=TaskLogs),
            described(
                web.get(f"{one}/logs/download", self.download),
                "Download a run's log",
                query=DownloadQuery,
                headers={"Range": "A single range of bytes (RFC 9110 section 14)."},
                answer=archive,
                also={206: a_part, 416: Content("No such range", headers=("Content-Range",))},
            ),
        ]

    async def list(self, request: web.Request) -> web.StreamResponse:
        query = read_query(request, TasksQuery)
        project_id, job_id = await self._job(request)
        return success(await self.queries.tasks(project_id, job_id, query.limit, query.before))

    async def get(self, request: web.Request) -> web.StreamResponse:
        moment = read_query(request, TaskQuery).as_of
        run = await self._run(request)
        if moment is not None:
            return success(await self.queries.task_as_of(run, moment))
        return success(await self.queries.task_detail(run), etag=run.version, embeds_others=True)

    async def history(self, request: web.Request) -> web.StreamResponse:
        query = read_query(request, HistoryQuery)
        run = await self._run(request)
        return success(await self.queries.history(RUN, run.id, before_version=query.before, limit=query.limit))

    async def logs(self, request: web.Request) -> web.StreamResponse:
        run = await self._run(request)
        return success({"task_logs": await self.queries.task_logs(str(run.id))})

    async def page(self, request: web.Request) -> web.StreamResponse:
        query = read_query(request, LogsQuery)
        body = await read_body(request, LogsBody)
        project_id, job_id = await self._job(request)
        run = await self.queries.task(project_id, job_id, run_id_of(body.file_path, job_id))
        page = await self.records.page(str(run.id), query.cursor, query.limit, newer=query.direction == "newer")
        return success(
            {
                "logs": [line_view(line) for line in page.lines],
                "older_cursor": page.older_cursor,
                "newer_cursor": page.newer_cursor,
                "has_more_older": page.has_more_older,
                "has_more_newer": page.has_more_newer,
            },
        )

    async def download(self, request: web.Request) -> web.StreamResponse:
        query = read_query(request, DownloadQuery)
        project_id, job_id = await self._job(request)
        run = await self.queries.task(project_id, job_id, run_id_of(query.file_path, job_id))
        return _attachment(request, f"job-{job_id}-run-{run.id}.tar.gz", await self.queries.log_archive(run))

    async def _run(self, request: web.Request) -> Entity[RunState]:
        project_id, job_id = await self._job(request)
        return await self.queries.task(project_id, job_id, request.match_info["taskid"])

    async def _job(self, request: web.Request) -> tuple[int, int]:
        project_id = project_of(request)
        job = await self.queries.past_or_present_job(project_id, path_id(request))
        return project_id, int(job.id)


@dataclass(frozen=True, slots=True)
class SettingsRoutes:
    """The handlers of a project's settings: a plain document, there when somebody first changed it.

    Args:
        allowed_networks: those of private addresses that may be called all the same.
    """

    documents: Documents
    clock: Clock
    allowed_networks: Sequence[IPNetwork]

    def routes(self) -> Sequence[web.RouteDef]:
        path = f"{PROJECT}/settings"
        described = partial(describe, tag="Project", answer=SettingsShown)
        return [
            described(web.get(path, self.get), "Fetch the project's settings"),
            described(web.put(path, self.put), "Change the project's settings", body=SettingsBody),
        ]

    async def get(self, request: web.Request) -> web.StreamResponse:
        project_id = project_of(request)
        kept = await self.documents.plain(SETTINGS).find_one({"_id": project_id}) or {}
        return success(_settings_view(project_id, kept.get("webhook_alert_url", "")))

    async def put(self, request: web.Request) -> web.StreamResponse:
        project_id = project_of(request)
        body = await read_body(request, SettingsBody)
        url = body.webhook_alert_url.strip()
        fault = outbound_fault(url, self.allowed_networks) if url else None
        if fault is not None:
            raise InvalidInput(f"webhook_alert_url {fault}", errors=[FieldError("webhook_alert_url", fault)])
        document = {
            "webhook_alert_url": url,
            "updated_at": self.clock.now(),
            "updated_by": metadata_of(request).actor,
        }
        await self.documents.plain(SETTINGS).replace_one({"_id": project_id}, document, upsert=True)
        message = "settings updated; alerts are not sent yet" if url else "settings updated"
        return success(_settings_view(project_id, url), message=message)


@dataclass(frozen=True, slots=True)
class InternalRoutes:
    """The handlers of the internal calls."""

    documents: Documents
    claims: Claims
    workers: Workers

    def routes(self) -> Sequence[web.RouteDef]:
        return [
            internal_route(internal.CLAIM_RUN, self.claim),
            internal_route(internal.HEARTBEAT, self.claims.heartbeat),
            internal_route(internal.FINISH_RUN, self.claims.finish),
            internal_route(internal.JOBS_EXISTING, self.jobs_existing),
        ]

    async def claim(self, call: internal.ClaimRun) -> internal.RunClaim:
        await self.workers.note(call.worker_id)
        return internal.RunClaim(run=await self.claims.claim(call.worker_id))

    async def jobs_existing(self, call: internal.JobsAsked) -> internal.JobsExisting:
        criteria = {"_id": {"$in": list(call.job_ids)}, "state.deleted": False}
        jobs = await self.documents.find(JOB, criteria, limit=len(call.job_ids) or 1)
        endpoints = [
            internal.JobEndpoints(
                job_id=int(job.id),
                source_id=job.state.definition.source_id,
                destination_id=job.state.definition.destination_id,
            )
            for job in jobs
        ]
        return internal.JobsExisting(job_ids=tuple(item.job_id for item in endpoints), endpoints=tuple(endpoints))


def path_id(request: web.Request) -> int:
    """The job's id in the path; a number that no id can have names nothing."""
    text = request.match_info["id"]
    identifier = number_of(text)
    if identifier is None or identifier > ID_MAX:
        raise NotFound(f"job {text[:20]} does not exist")
    return identifier


def _filter_of(request: web.Request) -> JobsQuery | None:
    """The seed's literal filter ``/jobs/dest_id=5``, the number with or without quotes."""
    field = next((name for name in ("source_id", "dest_id") if name in request.match_info), None)
    if field is None:
        return None
    number = request.match_info[field].strip("\"'")
    if not re.fullmatch(r"[1-9][0-9]{0,15}", number):
        message = f"{field} must be an id"
        raise InvalidInput(message, errors=[FieldError(field, message)])
    return JobsQuery(source_id=int(number)) if field == "source_id" else JobsQuery(dest_id=int(number))


def _settings_view(project_id: int, webhook_alert_url: str) -> JsonObject:
    return {"id": project_id, "project_id": project_id, "webhook_alert_url": webhook_alert_url}


def _attachment(request: web.Request, name: str, content: bytes) -> web.Response:
    """A file of which a single range may be asked for (RFC 9110 section 14)."""
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "Accept-Ranges": "bytes"}
    try:
        asked = request.http_range
    except ValueError:
        asked = slice(None)
    if asked.start is None and asked.stop is None:
        return web.Response(body=content, content_type="application/gzip", headers=headers)
    start, stop, _ = asked.indices(len(content))
    if start >= stop:
        headers["Content-Range"] = f"bytes */{len(content)}"
        return web.Response(status=416, headers=headers)
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
    return web.Response(status=206, body=content[start:stop], content_type="application/gzip", headers=headers)
