"""The catalog service, put together."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aiohttp import web

from libs.mongodb.encryption import Keyring
from libs.service.definition import ServiceContext, ServiceDefinition
from services.catalog.config import CatalogSettings
from services.catalog.connections import AGGREGATES, Connections
from services.catalog.domain.destination import DESTINATION
from services.catalog.domain.source import SOURCE
from services.catalog.http import ConnectionRoutes, ConnectorRoutes, DiscoveryRoutes, InternalRoutes
from services.catalog.projections import JOBS
from services.catalog.queries import INDEXES, CatalogQueries
from services.catalog.reactions import JOBS_REACTION
from services.catalog.reservations import Reservations, ReservationSweep
from services.catalog.vault import Vault


@asynccontextmanager
async def start(context: ServiceContext[CatalogSettings]) -> AsyncIterator[Sequence[web.AbstractRouteDef]]:
    """The routes, and the sweep of expired reservations."""
    settings, documents, commands = context.settings, context.documents, context.commands
    vault = Vault(documents, Keyring(settings.encryption_keys))
    queries = CatalogQueries(documents)
    connections = Connections(documents, commands, context.sequences, vault, context.clock)
    reservations = Reservations(
        documents=documents,
        commands=commands,
        sequences=context.sequences,
        connections=connections,
        queries=queries,
        vault=vault,
        verifier=context.verifier,
        clock=context.clock,
        reservation_seconds=settings.reservation_seconds,
    )
    sweep = ReservationSweep(queries, commands, context.internal, context.clock, settings.reservation_sweep_seconds)
    context.tasks.start("reservations", lambda: context.leases.run_while_leader("reservations", sweep.run))
    yield [
        *DiscoveryRoutes(queries, vault, context.internal).routes(),
        *(route for role in AGGREGATES for route in ConnectorRoutes(role, vault, context.internal).routes()),
        *(
            route
            for role in AGGREGATES
            for route in ConnectionRoutes(role, documents, commands, queries, connections).routes()
        ),
        *InternalRoutes(reservations).routes(),
    ]


SERVICE = ServiceDefinition(
    name="catalog",
    settings=CatalogSettings,
    start=start,
    aggregates=(SOURCE, DESTINATION),
    projections=(JOBS,),
    reactions=(JOBS_REACTION,),
    indexes=INDEXES,
)
