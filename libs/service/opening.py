"""Opens what a service works with, in order; everything is closed in the reverse order."""

import asyncio
import time
from contextlib import AsyncExitStack
from functools import partial

import structlog

from libs.contracts.services import SERVICES
from libs.core.clock import Clock
from libs.event_log import open_event_log
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.documents import Documents
from libs.eventsourcing.event_store import EventStore
from libs.mongodb.client import Client, PyMongoError, connect, in_short, is_passing
from libs.mongodb.leases import Leases
from libs.mongodb.sequences import Sequences
from libs.process.health import Health
from libs.process.settings import ServiceSettings
from libs.service.background import BackgroundTasks
from libs.service.definition import AnyDefinition, OwnStore, ServiceContext, ServiceDefinition, SettingsT
from libs.web.internal import InternalClient
from libs.web.principals import PrincipalSigner, PrincipalVerifier

OPEN_REFUSALS_MAX = 5
OPEN_BACKOFF_SECONDS_MAX = 5.0
STORE_SILENCE_SECONDS_MAX = 3.0

log = structlog.get_logger(__name__)


async def open_context(
    definition: ServiceDefinition[SettingsT], settings: SettingsT, clock: Clock, stack: AsyncExitStack
) -> ServiceContext[SettingsT]:
    """Open a service's clients, its event log, and its store if it has one; waits for a store that is unreachable."""
    client = connect(
        settings.mongodb_url, definition.name, pool_min=settings.database_pool_min, pool_max=settings.database_pool_max
    )
    stack.callback(client.close)
    signer = PrincipalSigner(definition.name, settings.signing_key)
    internal = InternalClient(settings, signer)
    stack.push_async_callback(internal.close)
    event_log = await open_event_log(settings, client, definition.name)
    stack.push_async_callback(event_log.close)
    health, tasks = Health(), BackgroundTasks()
    health.add("background tasks", tasks.problem)
    _check_keys(definition.name, settings, health)
    own = None
    if definition.uses_store:
        own = await _open_store(definition, settings, client, clock, stack)
        health.add("store", partial(_store_problem, own.store))
    return ServiceContext(
        settings=settings,
        clock=clock,
        health=health,
        tasks=tasks,
        principals=signer,
        verifier=PrincipalVerifier(definition.name, settings.trusted_keys),
        internal=internal,
        event_log=event_log,
        own=own,
    )


async def _open_store(
    definition: AnyDefinition, settings: ServiceSettings, client: Client, clock: Clock, stack: AsyncExitStack
) -> OwnStore:
    store = EventStore(client, settings.database_prefix + definition.name, instance=settings.instance)
    await _opened_when_reachable(store, definition)
    commands = CommandHandler(store, clock, definition.aggregates)
    commands.start()
    stack.push_async_callback(commands.close)
    return OwnStore(
        store=store,
        commands=commands,
        documents=Documents(store),
        sequences=Sequences(store.database["ids"]),
        leases=Leases(store.database["leases"], holder=settings.instance),
    )


async def _opened_when_reachable(store: EventStore, definition: AnyDefinition) -> None:
    """Wait while the store is unreachable; an error that a reachable store gives several times is raised."""
    delay_seconds, refusals = 0.1, 0
    while True:
        try:
            return await store.open(definition.collections, definition.indexes)
        except PyMongoError as error:
            refusals += not is_passing(error)
            if refusals >= OPEN_REFUSALS_MAX:
                raise
            log.warning("store_unavailable", service=definition.name, error=in_short(error))
        await asyncio.sleep(delay_seconds)
        delay_seconds = min(OPEN_BACKOFF_SECONDS_MAX, delay_seconds * 2)


async def _store_problem(store: EventStore) -> str | None:
    """Based on the reads of the head every second, so that the check is immediate even if the store hangs."""
    silence_seconds = time.monotonic() - store.answered_at
    if silence_seconds < STORE_SILENCE_SECONDS_MAX:
        return None
    return f"the store has not answered for {silence_seconds:.0f} s"


def _check_keys(service: str, settings: ServiceSettings, health: Health) -> None:
    for name, problem in _key_problems(service, settings).items():
        health.add(name, partial(_unchanging, problem))
        if problem is not None:
            log.warning("key_missing", service=service, setting=name.upper(), reason=problem)


def _key_problems(service: str, settings: ServiceSettings) -> dict[str, str | None]:
    """The keys that a service needs, and why it lacks them: its own to call others, its callers' to be called."""
    problems: dict[str, str | None] = {}
    row = next((row for row in SERVICES if row.name == service), None)
    if row is not None and row.calls:
        lacks_key = f"SIGNING_KEY is not set, so {service} can't call {', '.join(sorted(row.calls))}"
        problems["signing_key"] = lacks_key if settings.signing_key is None else None
    if row is not None and row.callers:
        unknown = ", ".join(sorted(row.callers - settings.trusted_keys.keys()))
        problems["trusted_keys"] = f"TRUSTED_KEYS has no key of {unknown}, whose calls are refused" if unknown else None
    return problems


async def _unchanging(problem: str | None) -> str | None:
    return problem
