"""Wires the worker together."""

import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aiohttp import web

from libs.service.definition import ServiceContext, ServiceDefinition
from services.worker.claiming import Claiming
from services.worker.config import WorkerSettings
from services.worker.http import ConnectorHttp
from services.worker.memory import bound_memory


@asynccontextmanager
async def start(context: ServiceContext[WorkerSettings]) -> AsyncIterator[Sequence[web.AbstractRouteDef]]:
    """Start claiming; at shutdown the runs under way are given back."""
    bound_memory()
    settings = context.settings
    worker_id = settings.worker_id or f"{socket.gethostname()}-{os.getpid()}"
    claiming = Claiming(settings, context.internal, context.clock, worker_id)
    context.tasks.start("wake-ups", lambda: claiming.follow_events(context.event_log))
    context.tasks.start("claiming", claiming.run)
    yield ConnectorHttp(settings, context.clock).routes()


SERVICE = ServiceDefinition(name="worker", settings=WorkerSettings, start=start, uses_store=False)
