"""The routes: jobs, their tasks and logs, settings; and the internal calls of workers and catalog."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Literal

from aiohttp import web

from libs.contracts import internal
from libs.contracts.streams import difference, parse_streams_config
from libs.core.addresses import IPNetwork, outbound_fault
from libs.core.clock import Clock
from libs.core.entity import Entity
from libs.core.errors import Conflict, FieldError, NotFound
from libs.core.json import parse_json
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.documents import Documents
from libs.web import routes
from libs.web.answers import Answer
from libs.web.calls import Call
from libs.web.entities import TEXTS, Entities, EntityRoutes, number
from libs.web.files import attachment
from libs.web.internal import internal_route
from libs.web.openapi import Content
from libs.web.requests import invalid_field
from services.job_orchestrator.answers import (
    ActivationEchoed,
    Cancelled,
    Clearing,
    JobDeleted,
    JobEchoed,
    JobListed,
    JobNameIsFree,
    JobShown,
    JobStateShown,
    LogPage,
    RunBegun,
    SettingsShown,
    StreamsDiffer,
    TaskDetail,
    TaskLogs,
    TaskShown,
    line_view,
    task_detail,
)
from services.job_orchestrator.claims import Claims
from services.job_orchestrator.domain.job import JOB, JobState, ResetStreams, SetActivation
from services.job_orchestrator.domain.run import RUN, RunState
from services.job_orchestrator.domain.streams import catalog_of
from services.job_orchestrator.inputs import (
    ActivationBody,
    DownloadQuery,
    IdText,
    JobBody,
    JobChangeBody,
    JobNameBody,
    JobQuery,
    JobsQuery,
    LogsBody,
    LogsQuery,
    SettingsBody,
    StateResetBody,
    StreamsChoiceBody,
    TasksQuery,
    VerifyBody,
    filter_of,
)
from services.job_orchestrator.job_writing import JobWriting, name_taken
from services.job_orchestrator.queries import JobQueries, Side
from services.job_orchestrator.run_control import CancelledRun, RunControl
from services.job_orchestrator.run_records import RunRecords
from services.job_orchestrator.workers import Workers

PROJECT = "/api/v1/project/{projectid}"
JOBS = f"{PROJECT}/jobs"
SETTINGS = "project_settings"

_ABOUT_ITS_RUN: Mapping[CancelledRun, str] = {
    None: "",
    "cancelled": "; its run was cancelled",
    "being cancelled": "; its run is being cancelled",
}


class JobRoutes(EntityRoutes[JobState, JobShown]):
    """The handlers of a project's jobs."""

    path = JOBS
    tag = "Jobs"
    shown = JobShown
    embeds_others = True

    def __init__(
        self,
        documents: Documents,
        commands: CommandHandler,
        queries: JobQueries,
        writing: JobWriting,
        control: RunControl,
    ) -> None:
        super().__init__(Entities(JOB, documents, commands))
        self._queries = queries
        self._writing = writing
        self._control = control

    def routes(self) -> Sequence[web.RouteDef]:
        get, post = partial(self.route, "GET"), partial(self.route, "POST")
        act = partial(post, idempotent=True, refuses=(409,))
        by_source, by_destination = (f"{JOBS}/{name}_id={{{name}_id:.*}}" for name in ("source", "dest"))
        listed = {"path_shapes": {"source_id": IdText, "dest_id": IdText}}
        echoed: dict[str, Any] = {"answer": JobEchoed, "versioned": True}
        return [
            post(self.path, self.create, "Create a job", idempotent=True, **echoed),
            get(self.path, self.jobs, "List the jobs", versioned=True),
            get(by_source, self.jobs_of, "List the jobs of a source", versioned=True, **listed),
            get(by_destination, self.jobs_of, "List the jobs of a destination", versioned=True, **listed),
            *self.reading_one(self.fetch),
            self.route("PUT", self.one, self.update, "Change a job", conditional=True, refuses=(409,), **echoed),
            self.route("DELETE", self.one, self.delete, "Delete a job", conditional=True),
            act(
                f"{self.one}/activate",
                self.activate,
                "Pause or resume a job",
                answer=ActivationEchoed,
                conditional=True,
            ),
            act(f"{self.one}/sync", self.sync, "Run a job now"),
            act(f"{self.one}/verify", self.verify, "Compare a job's source and destination"),
            get(f"{self.one}/cancel", self.cancel, "Cancel a job's run", refuses=(409,), changes=True),
            act(f"{self.one}/cancel", self.cancel, "Cancel a job's run"),
            get(
                f"{self.one}/clear-destination",
                self.clearing,
                "Ask whether a job's destination is being cleared",
            ),
            act(f"{self.one}/clear-destination", self.clear, "Clear a job's destination"),
            get(f"{self.one}/state", self.state, "How far a job's streams have been read"),
            act(f"{self.one}/state/reset", self.reset_state, "Read streams again from the start", answer=JobStateShown),
            post(f"{self.one}/stream-difference", self.stream_difference, "Which streams another choice would clear"),
            routes.post(
                f"{PROJECT}/check-unique",
                self.check_unique,
                "Ask whether a name is free",
                tag="Project",
                refuses=(409,),
            ),
        ]

    async def create(self, call: Call, body: JobBody) -> Answer[Any]:
        given = body.given(activate=True)
        job = await self._writing.create(call.project_id, given, call.metadata, call.idempotency)
        return await self._echo(job, body, f"job {given.name} created")

    async def jobs(self, call: Call, query: JobsQuery) -> Answer[list[JobListed]]:
        listed = await self._queries.jobs(
            call.project_id,
            source_id=query.source_id,
            destination_id=query.dest_id,
            objects=query.expand is not None,
            before=query.before,
            limit=query.limit or 0,
            summary=query.view == "summary",
        )
        return Answer(listed, len(listed), embeds_others=True)

    async def jobs_of(self, call: Call) -> Answer[list[JobListed]]:
        return await self.jobs(call, filter_of(call))

    async def fetch(self, call: Call, query: JobQuery) -> Answer[JobShown]:
        """One as it stands; with ``as_of`` as it was defined at that moment."""
        job = await self.entities.at(call, query.as_of)
        shown = await self._queries.job(call.project_id, job, objects=query.expand is not None)
        return Answer(shown, job.version if query.as_of is None else None, embeds_others=True)

    async def update(self, call: Call, body: JobChangeBody) -> Answer[Any]:
        job = await self.entities.require(call)
        given, clear = body.given(activate=job.state.definition.activate), body.streams_to_clear()
        changed = await self._writing.update(job, given, clear, call.metadata, expected_version=call.expected_version)
        if clear is not None and changed.state.active_run_id is not None:
            with contextlib.suppress(Conflict):
                await self._control.cancel(changed, call.metadata)
        self._control.changed()
        return await self._echo(changed, body, f"job {given.name} updated")

    async def delete(self, call: Call) -> Answer[JobDeleted]:
        job = await self.entities.require(call)
        run = await self._control.delete(job, call.metadata, expected_version=call.expected_version)
        name = job.state.definition.name
        return Answer({"name": name}, message=f"job {name} deleted{_ABOUT_ITS_RUN[run]}")

    async def activate(self, call: Call, body: ActivationBody) -> Answer[Any]:
        job = await self.entities.change(call, SetActivation(activate=body.activate))
        self._control.changed()
        state = "active" if body.activate else "paused"
        return Answer(body.model_dump(), message=f"job {job.state.definition.name} is {state}")

    async def sync(self, call: Call) -> Answer[RunBegun]:
        return await self._begin(call, "sync", "sync started")

    async def verify(self, call: Call, body: VerifyBody) -> Answer[RunBegun]:
        """Start a run that compares both ends, stream by stream; its result names what differs."""
        job = await self.entities.require(call)
        run_id = await self._control.begin(
            int(job.id),
            "sync",
            "manual",
            call.metadata,
            verify=True,
            repair=body.repair,
            idempotency=call.idempotency,
        )
        message = _about(job, "comparing and repairing started" if body.repair else "comparing started")
        return Answer({"task_id": run_id, "message": message}, message=message)

    async def clear(self, call: Call) -> Answer[RunBegun]:
        return await self._begin(call, "clear", "clearing the destination started")

    async def clearing(self, call: Call) -> Clearing:
        job = await self.entities.require(call)
        return {"running": job.state.is_clearing}

    async def state(self, call: Call) -> JobStateShown:
        return await self._queries.job_state(await self.entities.require(call))

    async def reset_state(self, call: Call, body: StateResetBody) -> Answer[Any]:
        job = await self.entities.require(call)
        _refuse_unknown_streams(job, body)
        changed = await self.entities.change(call, ResetStreams(streams=body.named()))
        shown = await self._queries.job_state(changed)
        return Answer(shown, message=_about(job, "the next run reads all rows of these streams again"))

    async def cancel(self, call: Call) -> Answer[Cancelled]:
        job = await self.entities.require(call)
        ended = await self._control.cancel(job, call.metadata, idempotency=call.idempotency)
        message = _about(job, "the run is cancelled" if ended else "the run is being cancelled")
        return Answer({"message": message}, message=message)

    async def stream_difference(self, call: Call, body: StreamsChoiceBody) -> StreamsDiffer:
        job = await self.entities.require(call)
        _, after = catalog_of(body.updated_streams_config, "updated_streams_config")
        found = difference(parse_streams_config(job.state.definition.streams_config_json), after)
        return {"difference_streams": found.model_dump(exclude_unset=True) if found.selections else {}}

    async def check_unique(self, call: Call, body: JobNameBody) -> JobNameIsFree:
        if body.entity_type == "job":
            if await self._queries.job_named(call.project_id, body.name) is not None:
                raise name_taken()
        elif await self._queries.endpoint_named(body.entity_type, call.project_id, body.name) is not None:
            message = f"a {body.entity_type} of this name exists in the project"
            raise Conflict(message, code="already_exists", errors=[FieldError("name", message, "taken")])
        return {"unique": True}

    async def _begin(self, call: Call, kind: Literal["sync", "clear"], begun: str) -> Answer[RunBegun]:
        job = await self.entities.require(call)
        message = _about(job, begun)
        run_id = await self._control.begin(int(job.id), kind, "manual", call.metadata, idempotency=call.idempotency)
        return Answer({"task_id": run_id, "message": message}, message=message)

    async def _echo(self, job: Entity[JobState], body: JobBody, message: str) -> Answer[Any]:
        """What was sent and the id; each ``config`` as catalog stores it, its secrets replaced by references."""
        view = await self._queries.job(job.state.project_id, job, objects=False)
        echo = body.model_dump(exclude_unset=True)
        sides: tuple[Side, ...] = ("source", "destination")
        for side in sides:
            if "config" in echo[side]:
                masked = view[side]["config"]
                as_text = isinstance(echo[side]["config"], str)
                echo[side]["config"] = masked if as_text else parse_json(masked.encode())
        return Answer(echo | {"id": job.id}, job.version, message)


class TaskRoutes(EntityRoutes[RunState, TaskDetail]):
    """The handlers of a job's tasks (its runs) and their logs; those of a deleted job stay readable."""

    path = f"{JOBS}/{{id:\\d+}}/tasks"
    tag = "Tasks"
    shown = TaskDetail
    embeds_others = True

    def __init__(
        self, documents: Documents, commands: CommandHandler, queries: JobQueries, records: RunRecords
    ) -> None:
        super().__init__(Entities(RUN, documents, commands, parameter="taskid", ids=TEXTS, permit=_of_the_job))
        self._jobs = Entities(JOB, documents, commands)
        self._queries = queries
        self._records = records

    def routes(self) -> Sequence[web.RouteDef]:
        archive = Content("The log as a tar.gz", bytes, "application/gzip", ("Content-Disposition",))
        a_part = Content("The range that was asked for", bytes, "application/gzip", ("Content-Range",))
        get, post = partial(self.route, "GET"), partial(self.route, "POST")
        job = f"{JOBS}/{{id:\\d+}}"
        return [
            get(self.path, self.tasks, "List a job's runs"),
            *self.reading_one(),
            post(f"{self.one}/logs", self.page_of_log, "Page through a run's log"),
            get(f"{job}/task/{{taskid}}/logs", self.logs, "A run's log"),
            get(
                f"{job}/logs/download",
                self.download,
                "Download a run's log",
                headers={"Range": "A single range of bytes (RFC 9110 section 14)."},
                answer=archive,
                also={206: a_part, 416: Content("No such range", headers=("Content-Range",))},
            ),
        ]

    async def view(self, call: Call, entity: Entity[RunState], as_of: datetime | None = None) -> TaskDetail:
        if as_of is not None:
            # How far it was then is not stored.
            return task_detail(entity, (), as_of)
        return await self._queries.task(entity)

    async def tasks(self, call: Call, query: TasksQuery) -> list[TaskShown]:
        job = await self._jobs.require(call, deleted_too=True)
        return await self._queries.tasks(call.project_id, int(job.id), query.limit, query.before)

    async def logs(self, call: Call) -> TaskLogs:
        run = await self.entities.require(call)
        return {"task_logs": await self._queries.task_logs(str(run.id))}

    async def page_of_log(self, call: Call, query: LogsQuery, body: LogsBody) -> LogPage:
        run = await self._run_of(call, body.file_path)
        page = await self._records.page(str(run.id), query.cursor, query.limit, newer=query.direction == "newer")
        return {
            "logs": [line_view(line) for line in page.lines],
            "older_cursor": page.older_cursor,
            "newer_cursor": page.newer_cursor,
            "has_more_older": page.has_more_older,
            "has_more_newer": page.has_more_newer,
        }

    async def download(self, call: Call, query: DownloadQuery) -> web.StreamResponse:
        run = await self._run_of(call, query.file_path)
        name = f"job-{run.state.job_id}-run-{run.id}.tar.gz"
        return attachment(call.request, name, await self._queries.log_archive(run))

    async def _run_of(self, call: Call, path: str) -> Entity[RunState]:
        """The run that a ``file_path`` of this job names; raises ``NotFound`` for any other."""
        job_id, run_id = call.path("id"), path.rsplit("/", 1)[-1]
        if path != f"jobs/{job_id}/runs/{run_id}" or not run_id:
            raise NotFound(f"file_path is not one of job {job_id[:20]}")
        return await self.entities.named(call, run_id)


@dataclass(frozen=True, slots=True)
class SettingsRoutes:
    """The handlers of a project's settings: a plain document, written when they are first changed.

    Args:
        allowed_networks: private addresses that may be called all the same.
    """

    documents: Documents
    clock: Clock
    allowed_networks: Sequence[IPNetwork]

    def routes(self) -> Sequence[web.RouteDef]:
        path = f"{PROJECT}/settings"
        return [
            routes.get(path, self.get, "Fetch the project's settings", tag="Project"),
            routes.put(path, self.put, "Change the project's settings", tag="Project"),
        ]

    async def get(self, call: Call) -> SettingsShown:
        kept = await self.documents.plain(SETTINGS).find_one({"_id": call.project_id}) or {}
        return _settings_view(call.project_id, kept.get("webhook_alert_url", ""))

    async def put(self, call: Call, body: SettingsBody) -> Answer[SettingsShown]:
        if body.project_id is not None and str(body.project_id) != str(call.project_id):
            raise invalid_field("project_id", f"must be {call.project_id}, the project of the path")
        url = body.webhook_alert_url.strip()
        fault = outbound_fault(url, self.allowed_networks) if url else None
        if fault is not None:
            raise invalid_field("webhook_alert_url", fault)
        document = {
            "webhook_alert_url": url,
            "updated_at": self.clock.now(),
            "updated_by": call.metadata.actor,
        }
        await self.documents.plain(SETTINGS).replace_one({"_id": call.project_id}, document, upsert=True)
        message = "settings updated; alerts are not sent yet" if url else "settings updated"
        return Answer(_settings_view(call.project_id, url), message=message)


@dataclass(frozen=True, slots=True)
class InternalRoutes:
    """The handlers of the internal calls."""

    documents: Documents
    claims: Claims
    workers: Workers

    def routes(self) -> Sequence[web.RouteDef]:
        return [
            internal_route(internal.CLAIM_WORK, self.claim),
            internal_route(internal.HEARTBEAT, self.claims.heartbeat),
            internal_route(internal.FINISH_WORK, self.claims.finish),
            internal_route(internal.JOBS_EXISTING, self.jobs_existing),
        ]

    async def claim(self, call: internal.ClaimWork) -> internal.WorkClaim:
        await self.workers.note(call.worker_id)
        return await self.claims.claim(call)

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


async def _of_the_job(call: Call, run: Entity[RunState]) -> bool:
    return run.project_id == call.project_id and run.state.job_id == number(call.path("id"))


def _refuse_unknown_streams(job: Entity[JobState], body: StateResetBody) -> None:
    """Refuse streams that the job does not move, as far as its catalog says which it moves."""
    config = parse_streams_config(job.state.definition.streams_config_json)
    known = {item.key for item in config.selections} or {entry.stream.key for entry in config.streams}
    for index, item in enumerate(body.streams):
        if known and (item.namespace, item.name) not in known:
            raise invalid_field(f"streams[{index}]", "is not one of the job's streams")


def _about(job: Entity[JobState], what: str) -> str:
    return f"job {job.state.definition.name}: {what}"


def _settings_view(project_id: int, webhook_alert_url: str) -> SettingsShown:
    return {"id": project_id, "project_id": str(project_id), "webhook_alert_url": webhook_alert_url}
