"""The use cases of sources and destinations: create, change, delete."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from libs.core.clock import Clock
from libs.core.decider import Aggregate
from libs.core.entity import Entity
from libs.core.errors import Conflict
from libs.core.json import JsonObject
from libs.eventsourcing.batch import SideWrite
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.documents import Documents
from libs.mongodb.sequences import Sequences
from libs.web.calls import Call
from services.catalog.domain.connection import (
    SECRETS_CHANGED,
    Connection,
    Create,
    Definition,
    Delete,
    Role,
    Update,
    require_same_type,
)
from services.catalog.domain.destination import DESTINATION
from services.catalog.domain.source import SOURCE
from services.catalog.vault import Configuration, Place, Vault

ATTEMPTS_MAX = 5

AGGREGATES: dict[Role, Aggregate[Connection]] = {"source": SOURCE, "destination": DESTINATION}


@dataclass(frozen=True, slots=True)
class Given:
    """A source or destination as a request gives it; ``version`` is canonical already."""

    name: str
    type: str
    version: str
    config: JsonObject


@dataclass(frozen=True, slots=True)
class Written:
    """A definition to store, and the secrets to store or delete with it."""

    definition: Definition
    side_writes: Sequence[SideWrite]


@dataclass(frozen=True, slots=True)
class Connections:
    """Writes sources and destinations, their secrets apart from their events."""

    documents: Documents
    commands: CommandHandler
    sequences: Sequences
    vault: Vault
    clock: Clock

    async def create(self, role: Role, given: Given, call: Call) -> Entity[Connection]:
        """Raises ``InvalidInput`` for a bad configuration, ``Conflict`` for a taken name."""
        configuration = await self.vault.configuration(call.project_id, role, given.type, given.config)
        entity_id = await self.sequences.next(role)
        written = self.written(call.project_id, entity_id, given, configuration)
        return await self.commands.handle(
            AGGREGATES[role],
            entity_id,
            Create(written.definition),
            call.metadata,
            side_writes=written.side_writes,
            idempotency=call.idempotency,
        )

    async def update(self, role: Role, entity_id: int, given: Given, call: Call) -> Entity[Connection]:
        """Raises besides ``NotFound``, and ``PreconditionFailed`` where ``If-Match`` is not the current version."""

        async def attempt() -> Entity[Connection]:
            before = await self.documents.require(AGGREGATES[role], entity_id, call.project_id)
            written = await self._changed(role, before, given)
            command = Update(written.definition, before.state.definition.secret_ref)
            return await self.commands.handle(
                AGGREGATES[role],
                entity_id,
                command,
                call.metadata,
                expected_version=call.expected_version,
                side_writes=written.side_writes,
            )

        return await _while_secrets_change(attempt)

    async def delete(self, role: Role, entity_id: int, call: Call) -> Entity[Connection]:
        """Delete it with its secrets; raises ``Conflict``, naming the jobs, while jobs use it."""

        async def attempt() -> Entity[Connection]:
            before = await self.documents.require(AGGREGATES[role], entity_id, call.project_id)
            secret_ref = before.state.definition.secret_ref
            return await self.commands.handle(
                AGGREGATES[role],
                entity_id,
                Delete(secret_ref),
                call.metadata,
                expected_version=call.expected_version,
                side_writes=[] if secret_ref is None else [self.vault.forget(secret_ref)],
            )

        return await _while_secrets_change(attempt)

    def written(self, project_id: int, entity_id: int, given: Given, configuration: Configuration) -> Written:
        """A definition with newly encrypted secrets."""
        if not configuration.secrets:
            return Written(self._definition(given, configuration, entity_id, None), [])
        secret_ref = self.vault.new_ref()
        place = Place(project_id, configuration.role, entity_id, secret_ref, configuration.type, configuration.address)
        sealed = self.vault.seal(place, configuration.secrets, self.clock.now())
        return Written(self._definition(given, configuration, entity_id, secret_ref), [sealed])

    async def _changed(self, role: Role, before: Entity[Connection], given: Given) -> Written:
        """Unchanged secrets are kept; changed ones replace them."""
        state, entity_id = before.state, int(before.id)
        configuration = await self._configuration_of_change(role, before, given)
        former_ref = state.definition.secret_ref
        if former_ref is None:
            return self.written(state.project_id, entity_id, given, configuration)
        if await self.vault.stored(former_ref) == (configuration.secrets, configuration.address):
            return Written(self._definition(given, configuration, entity_id, former_ref), [])
        written = self.written(state.project_id, entity_id, given, configuration)
        return Written(written.definition, [*written.side_writes, self.vault.forget(former_ref)])

    async def _configuration_of_change(self, role: Role, before: Entity[Connection], given: Given) -> Configuration:
        require_same_type(role, before.state.definition.type, given.type)
        return await self.vault.configuration(before.state.project_id, role, given.type, given.config)

    @staticmethod
    def _definition(given: Given, configuration: Configuration, entity_id: int, secret_ref: str | None) -> Definition:
        return Definition(
            name=given.name,
            type=configuration.type,
            version=given.version,
            config_json=configuration.masked_json(entity_id, secret_ref or ""),
            secret_ref=secret_ref,
        )


async def _while_secrets_change(attempt: Callable[[], Awaitable[Entity[Connection]]]) -> Entity[Connection]:
    """Prepare and decide again if another request has changed the secrets meanwhile."""
    for _ in range(ATTEMPTS_MAX - 1):
        try:
            return await attempt()
        except Conflict as conflict:
            if conflict.code != SECRETS_CHANGED:
                raise
    return await attempt()
