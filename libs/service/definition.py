"""What a service is made of, and what it is given to work with."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from aiohttp import web

from libs.core.clock import Clock
from libs.core.decider import Aggregate, Projection, Reaction
from libs.event_log.port import EventLog
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.documents import Documents
from libs.eventsourcing.event_store import EventStore
from libs.mongodb.client import IndexModel
from libs.mongodb.leases import Leases
from libs.mongodb.sequences import Sequences
from libs.process.health import Health
from libs.process.settings import ServiceSettings
from libs.service.background import BackgroundTasks
from libs.web.internal import InternalClient
from libs.web.principals import PrincipalSigner, PrincipalVerifier

SettingsT = TypeVar("SettingsT", bound=ServiceSettings)


@dataclass(frozen=True, slots=True)
class OwnStore:
    """A service's own database and what works on it."""

    store: EventStore
    commands: CommandHandler
    documents: Documents
    sequences: Sequences
    leases: Leases


@dataclass(frozen=True)
class ServiceContext(Generic[SettingsT]):
    """What a service is given to work with; a service without a store must not use the store's parts."""

    settings: SettingsT
    clock: Clock
    health: Health
    tasks: BackgroundTasks
    principals: PrincipalSigner
    verifier: PrincipalVerifier
    internal: InternalClient
    event_log: EventLog
    own: OwnStore | None

    @property
    def store(self) -> EventStore:
        return self._required.store

    @property
    def commands(self) -> CommandHandler:
        return self._required.commands

    @property
    def documents(self) -> Documents:
        return self._required.documents

    @property
    def sequences(self) -> Sequences:
        return self._required.sequences

    @property
    def leases(self) -> Leases:
        return self._required.leases

    @property
    def _required(self) -> OwnStore:
        assert self.own is not None, "the service's definition says that it uses no store"
        return self.own


Start = Callable[[ServiceContext[SettingsT]], AbstractAsyncContextManager[Sequence[web.AbstractRouteDef]]]


@dataclass(frozen=True)
class ServiceDefinition(Generic[SettingsT]):
    """What a service is made of.

    Args:
        aggregates: the entities that it owns.
        projections: the documents that it keeps about other services' entities.
        reactions: the commands that other services' events cause.
        indexes: additional indexes, by logical collection name.
        start: opens what else the service needs, yields its routes, and closes in reverse order.
        uses_store: False for a service without a database of its own.
    """

    name: str
    settings: type[SettingsT]
    start: Start[SettingsT]
    aggregates: tuple[Aggregate[Any], ...] = ()
    projections: tuple[Projection, ...] = ()
    reactions: tuple[Reaction, ...] = ()
    indexes: Mapping[str, Sequence[IndexModel]] = field(default_factory=dict)
    uses_store: bool = True

    @property
    def collections(self) -> tuple[str, ...]:
        """The logical names of all event-sourced collections."""
        names = [aggregate.collection for aggregate in self.aggregates]
        names += [aggregate.listing.collection for aggregate in self.aggregates if aggregate.listing is not None]
        return tuple(names + [projection.collection for projection in self.projections])

    @property
    def topics(self) -> tuple[str, ...]:
        """The topics that the service follows."""
        followed = [item.topic for item in self.projections] + [item.topic for item in self.reactions]
        return tuple(dict.fromkeys(followed))


AnyDefinition = ServiceDefinition[Any]
