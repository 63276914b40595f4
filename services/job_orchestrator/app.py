"""The composition root of the job orchestrator."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aiohttp import web

from libs.eventsourcing.retention import Retention
from libs.mongodb.client import ASCENDING, DESCENDING, IndexModel
from libs.service.definition import ServiceContext, ServiceDefinition
from services.job_orchestrator import run_records
from services.job_orchestrator.claims import Claims
from services.job_orchestrator.config import JobOrchestratorSettings
from services.job_orchestrator.domain.job import JOB
from services.job_orchestrator.domain.run import RUN
from services.job_orchestrator.http import InternalRoutes, JobRoutes, SettingsRoutes, TaskRoutes
from services.job_orchestrator.job_writing import KEYED_IDS, KEYED_IDS_INDEXES, JobWriting
from services.job_orchestrator.measurements import Measurements
from services.job_orchestrator.projections import DESTINATIONS, SOURCES
from services.job_orchestrator.queries import RESERVED, RESERVED_INDEXES, JobQueries
from services.job_orchestrator.run_control import RunControl
from services.job_orchestrator.run_records import RunRecords
from services.job_orchestrator.scheduler import Scheduler
from services.job_orchestrator.stream_states import STREAM_STATES, STREAM_STATES_INDEXES
from services.job_orchestrator.workers import WORKERS, WORKERS_INDEXES, Workers

_WAITING = [("state.status", ASCENDING), ("state.waiting_since", ASCENDING)]
_OF_JOB = [("project_id", ASCENDING), ("state.job_id", ASCENDING), ("state.queued_at", DESCENDING)]
_BY_NAME = IndexModel([("project_id", ASCENDING), ("name", ASCENDING)])

INDEXES = {
    JOB.collection: [
        IndexModel([("project_id", ASCENDING), ("_id", DESCENDING)]),
        IndexModel([("state.next_tick", ASCENDING)]),
        IndexModel([("state.scheduled_until", ASCENDING)]),
        IndexModel(
            [("state.clear_wanted_json", ASCENDING)],
            partialFilterExpression={"state.clear_wanted_json": {"$type": "string"}},
        ),
    ],
    RUN.collection: [IndexModel(_WAITING), IndexModel(_OF_JOB), IndexModel([("state.finished_at", ASCENDING)])],
    SOURCES.collection: [_BY_NAME],
    DESTINATIONS.collection: [_BY_NAME],
    RESERVED: RESERVED_INDEXES,
    KEYED_IDS: KEYED_IDS_INDEXES,
    WORKERS: WORKERS_INDEXES,
    STREAM_STATES: STREAM_STATES_INDEXES,
    **run_records.INDEXES,
}


@asynccontextmanager
async def start(context: ServiceContext[JobOrchestratorSettings]) -> AsyncIterator[Sequence[web.AbstractRouteDef]]:
    documents, commands, clock = context.documents, context.commands, context.clock
    changed = asyncio.Event()
    records = RunRecords(documents, clock, context.settings.run_retention_seconds)
    control = RunControl(documents, commands, clock, changed.set)
    queries = JobQueries(documents, records, clock)
    writing = JobWriting(documents, commands, queries, context.sequences, context.internal, clock)
    claims = Claims(documents, commands, control, records, context.principals, clock, context.settings)
    scheduler = Scheduler(documents, control, clock, changed)
    context.tasks.start("scheduler", lambda: context.leases.run_while_leader("scheduler", scheduler.run))
    workers = Workers(documents)
    context.health.add("worker", workers.absence)
    retention = Retention(
        documents,
        clock,
        collection=RUN.collection,
        field="state.finished_at",
        keep_seconds=context.settings.run_retention_seconds,
    )
    context.tasks.start("retention", lambda: context.leases.run_while_leader("retention", retention.run))
    context.tasks.start("measurements", Measurements(documents, clock).run)
    yield [
        *JobRoutes(documents, commands, queries, writing, control).routes(),
        *TaskRoutes(documents, commands, queries, records).routes(),
        *SettingsRoutes(documents, clock, context.settings.outbound_allowed_networks).routes(),
        *InternalRoutes(documents, claims, workers).routes(),
    ]


SERVICE = ServiceDefinition(
    name="job_orchestrator",
    settings=JobOrchestratorSettings,
    aggregates=(JOB, RUN),
    projections=(SOURCES, DESTINATIONS),
    indexes=INDEXES,
    start=start,
)
