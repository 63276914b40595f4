"""Wires the worker together."""

import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from aiohttp import web

from libs.contracts.internal import RUN_WORK, ClaimedRun
from libs.contracts.runs import RunQueued
from libs.service.definition import ServiceContext, ServiceDefinition
from services.worker.claiming import Claiming, WorkKind
from services.worker.config import WorkerSettings
from services.worker.http import ConnectorHttp
from services.worker.memory import bound_memory
from services.worker.run import RunExecutor


@asynccontextmanager
async def start(context: ServiceContext[WorkerSettings]) -> AsyncIterator[Sequence[web.AbstractRouteDef]]:
    """Start claiming; at shutdown work in progress is given back."""
    bound_memory()
    settings, calls = context.settings, context.internal
    worker_id = settings.worker_id or f"{socket.gethostname()}-{os.getpid()}"
    runs = RunExecutor(
        calls, parquet_roots=settings.parquet_roots, stall_timeout_seconds=settings.stall_timeout_seconds
    )
    kinds = {RUN_WORK: WorkKind(ClaimedRun, runs.execute, RunQueued)}
    claiming = Claiming(settings, calls, context.clock, worker_id, kinds)
    for topic in claiming.topics:
        context.tasks.start(f"wake-ups from {topic}", partial(claiming.follow_events, context.event_log, topic))
    context.tasks.start("claiming", claiming.run)
    yield ConnectorHttp(settings, context.clock).routes()


SERVICE = ServiceDefinition(name="worker", settings=WorkerSettings, start=start, uses_store=False)
