"""The record sync service, put together."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aiohttp import web

from libs.mongodb.wake_ups import HeadWatcher
from libs.service.definition import ServiceContext, ServiceDefinition
from services.record_sync.config import RecordSyncSettings
from services.record_sync.domain.record import RECORD
from services.record_sync.feed import Feed
from services.record_sync.http import RecordRoutes
from services.record_sync.queries import INDEXES, RecordQueries
from services.record_sync.records import Records


@asynccontextmanager
async def start(context: ServiceContext[RecordSyncSettings]) -> AsyncIterator[Sequence[web.AbstractRouteDef]]:
    """The routes, and a watcher of the store that wakes the readers of changes."""
    watcher = HeadWatcher(context.store.client, [context.store.database.name])
    routes = RecordRoutes(
        records=Records(context.documents, context.commands),
        queries=RecordQueries(context.documents),
        feed=Feed(context.store, watcher, context.health),
    )
    try:
        yield routes.routes()
    finally:
        watcher.close()


SERVICE = ServiceDefinition(
    name="record_sync",
    settings=RecordSyncSettings,
    start=start,
    aggregates=(RECORD,),
    indexes=INDEXES,
)
