"""The background work of a service that has a store: its head, its relay, and a consumer per topic that it follows."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from libs.core.errors import RetryLater
from libs.eventsourcing.consumer import Consumer
from libs.eventsourcing.event_store import EventStore
from libs.eventsourcing.log_identity import record_log
from libs.eventsourcing.rebuild import Rebuild, RebuildFailed
from libs.eventsourcing.relay import Relay
from libs.mongodb.client import PyMongoError, in_short
from libs.service.definition import AnyDefinition, ServiceContext

HEAD_SECONDS = 1.0

log = structlog.get_logger(__name__)


def start_store_tasks(definition: AnyDefinition, context: ServiceContext[Any]) -> None:
    """Start them; what only one instance may do at a time is done under a lease."""
    context.tasks.start("head", lambda: keep_head_fresh(context.store))
    # One of the instances holds this lease; it tells the operator's commands that the service runs.
    _start_under_lease(context, "presence", _until_cancelled)
    context.tasks.start("log identity", lambda: record_log(context.store, context.event_log))
    if context.event_log.needs_relay and definition.aggregates:
        relay = Relay(context.store, context.event_log, context.commands)
        context.health.add("relay", relay.reason_to_be_stopped)
        _start_under_lease(context, "relay", relay.run)
    for topic in definition.topics:
        _start_under_lease(context, f"consumer/{topic}", _consumer(definition, context, topic).run)


async def keep_head_fresh(store: EventStore) -> None:
    """Read the head every second: to notice that a rebuild swapped collections, or that the store does not answer."""
    is_away = False
    while True:
        try:
            await store.head()
            if is_away:
                log.info("head_read_again", database=store.database.name)
            is_away = False
        except (PyMongoError, RetryLater) as error:
            if not is_away:
                log.warning("head_not_read", database=store.database.name, error=in_short(error))
            is_away = True
        await asyncio.sleep(HEAD_SECONDS)


def _consumer(definition: AnyDefinition, context: ServiceContext[Any], topic: str) -> Consumer:
    return Consumer(
        topic=topic,
        event_log=context.event_log,
        store=context.store,
        commands=context.commands,
        health=context.health,
        projections=[item for item in definition.projections if item.topic == topic],
        reactions=[item for item in definition.reactions if item.topic == topic],
        refold=_refolding(definition, context) if definition.projections else None,
    )


def _refolding(definition: AnyDefinition, context: ServiceContext[Any]) -> Callable[[], Awaitable[bool]]:
    """Rebuilds the projections after an upgrade: they lack what the earlier version did not understand."""

    async def refold() -> bool:
        rebuild = Rebuild(
            context.store, context.event_log, projections=definition.projections, indexes=definition.indexes
        )
        try:
            await rebuild.run()
        except RebuildFailed as error:
            log.error("projections_not_refolded", reason=str(error), repair=f"datasync rebuild {definition.name}")
            return False
        return True

    return refold


def _start_under_lease(context: ServiceContext[Any], name: str, work: Callable[[], Awaitable[None]]) -> None:
    context.tasks.start(name, lambda: context.leases.run_while_leader(name, work))


async def _until_cancelled() -> None:
    await asyncio.get_running_loop().create_future()
