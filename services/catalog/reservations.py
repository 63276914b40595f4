"""A job's references to its source and destination: reserved before it exists, resolved for its runs, released when
the job never appears."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import structlog

from libs.contracts.internal import (
    JOBS_EXISTING,
    EndpointReserved,
    EndpointResolved,
    EndpointsReserved,
    EndpointsResolved,
    EndpointWanted,
    JobEndpoints,
    JobsAsked,
    ReserveEndpoints,
    ResolveEndpoints,
)
from libs.core.clock import Clock
from libs.core.decider import Act
from libs.core.entity import Entity
from libs.core.envelope import Metadata
from libs.core.errors import Conflict, DataSyncError, FieldError, Forbidden, InvalidInput, RetryLater
from libs.eventsourcing.batch import SideWrite
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.documents import Documents
from libs.eventsourcing.requests import CommandRequest
from libs.mongodb.sequences import Sequences
from libs.process.live import Live
from libs.web.inputs import canonical_name
from libs.web.internal import InternalClient
from libs.web.principals import PrincipalVerifier
from libs.web.requests import invalid_field
from services.catalog.connections import AGGREGATES, Connections, Given
from services.catalog.domain.connection import Command, Confirm, Connection, Create, Expire, Reference, Reserve, Role
from services.catalog.queries import CatalogQueries
from services.catalog.vault import Vault
from services.catalog.versions import canonical_version

ATTEMPTS_MAX = 3
SWEEP_MARGIN_SECONDS = 30.0
SWEEP_CONNECTIONS_MAX = 200

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _End:
    """One end of a job: a connection that exists, or one to create."""

    role: Role
    entity_id: int
    version: str
    create: Create | None = None
    side_writes: Sequence[SideWrite] = ()

    def acts(self, reserve: Reserve) -> list[Act]:
        commands: list[Command] = [reserve] if self.create is None else [self.create, reserve]
        return [Act(AGGREGATES[self.role], self.entity_id, command) for command in commands]


@dataclass(frozen=True, slots=True)
class Reservations:
    """Answers job_orchestrator and workers."""

    documents: Documents
    commands: CommandHandler
    sequences: Sequences
    connections: Connections
    queries: CatalogQueries
    vault: Vault
    verifier: PrincipalVerifier
    clock: Clock
    reservation_seconds: float

    async def reserve(self, call: ReserveEndpoints, metadata: Metadata) -> EndpointsReserved:
        """Reserve both ends in one step; the same call again answers the same.

        An end without id that equals an existing connection (name, type, version, configuration) is that one.

        Raises:
            NotFound: an id is not of this project.
            Conflict: another connection has the name.
            InvalidInput: a bad configuration, or two versions.
        """
        for attempt in range(ATTEMPTS_MAX):
            source = await self._end("source", call, call.source)
            destination = await self._end("destination", call, call.destination)
            if source.version != destination.version:
                raise _versions_differ(source.version, destination.version)
            try:
                return await self._reserve(call, source, destination, metadata)
            except Conflict:
                # A repetition of this call created them, or another request took the name; trying again tells which.
                if attempt == ATTEMPTS_MAX - 1 or (source.create is None and destination.create is None):
                    raise
        raise AssertionError("the last attempt answers or raises")

    async def resolve(self, call: ResolveEndpoints) -> EndpointsResolved:
        """Both configurations with their secrets, for the run that the grant names."""
        grant = self.verifier.verify_grant(call.grant, "job_orchestrator")
        source_id, destination_id, project_id = (
            _number(grant, name) for name in ("source_id", "destination_id", "project_id")
        )
        source, destination = await asyncio.gather(
            self._resolved("source", source_id, project_id),
            self._resolved("destination", destination_id, project_id),
        )
        log.info("endpoints_resolved", run_id=grant.get("run_id"), source_id=source_id, destination_id=destination_id)
        return EndpointsResolved(source=source, destination=destination)

    async def _reserve(
        self, call: ReserveEndpoints, source: _End, destination: _End, metadata: Metadata
    ) -> EndpointsReserved:
        reserved_until = self.clock.now() + timedelta(seconds=self.reservation_seconds)
        reserve = Reserve(call.job_id, call.job_name, reserved_until)
        source_acts, destination_acts = source.acts(reserve), destination.acts(reserve)
        outcome = await self.commands.execute(
            CommandRequest(
                [*source_acts, *destination_acts],
                metadata,
                side_writes=[*source.side_writes, *destination.side_writes],
            )
        )
        return EndpointsReserved(
            source=_reserved(outcome.entities[len(source_acts) - 1]),
            destination=_reserved(outcome.entities[-1]),
            reserved_until=reserved_until,
        )

    async def _end(self, role: Role, call: ReserveEndpoints, wanted: EndpointWanted) -> _End:
        try:
            return await self._end_of(role, call.project_id, wanted)
        except DataSyncError as error:
            raise _prefixed(role, error) from None

    async def _end_of(self, role: Role, project_id: int, wanted: EndpointWanted) -> _End:
        if wanted.id is not None:
            entity = await self.documents.require(AGGREGATES[role], wanted.id, project_id)
            return _End(role, wanted.id, entity.state.definition.version)
        given = _given(wanted)
        configuration = await self.vault.configuration(project_id, role, given.type, given.config)
        known = await self.queries.named(role, project_id, given.name)
        if known is not None:
            definition = known.state.definition
            same_kind = (definition.type, definition.version) == (configuration.type, given.version)
            if same_kind and await self.vault.clear_config(definition) == configuration.clear:
                return _End(role, int(known.id), definition.version)
            message = f"another {role} of this name exists in the project; give its id to use it"
            raise Conflict(message, code="already_exists", errors=[FieldError("name", message, "taken")])
        entity_id = await self.sequences.next(role)
        written = self.connections.written(project_id, entity_id, given, configuration)
        return _End(role, entity_id, given.version, Create(written.definition), written.side_writes)

    async def _resolved(self, role: Role, entity_id: int, project_id: int) -> EndpointResolved:
        entity = await self.documents.require(AGGREGATES[role], entity_id, project_id)
        definition = entity.state.definition
        config = await self.vault.clear_config(definition)
        return EndpointResolved(id=entity_id, type=definition.type, version=definition.version, config=config)


@dataclass(frozen=True, slots=True)
class ReservationSweep:
    """Confirms or releases reservations whose deadline has passed: job_orchestrator says whether the job uses them."""

    queries: CatalogQueries
    commands: CommandHandler
    internal: InternalClient
    clock: Clock
    interval_seconds: Live[float]

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            try:
                await self.sweep()
            except RetryLater as error:
                log.warning("reservation_sweep_postponed", error=error.message)
            await asyncio.sleep(self.interval_seconds.value)

    async def sweep(self) -> None:
        """One sweep; it waits a while after the deadline, so that a job created at the last moment is seen."""
        ended_before = self.clock.now() - timedelta(seconds=SWEEP_MARGIN_SECONDS)
        for role in AGGREGATES:
            connections = await self.queries.reserved_until_before(role, ended_before, SWEEP_CONNECTIONS_MAX)
            job_ids = {item.job_id for entity in connections for item in _ended(entity, ended_before)}
            if not job_ids:
                continue
            existing = await self.internal.call(JOBS_EXISTING, JobsAsked(job_ids=tuple(sorted(job_ids))))
            used = {item.job_id: item for item in existing.endpoints}
            for entity in connections:
                for reference in _ended(entity, ended_before):
                    await self._settle(role, entity, reference, used.get(reference.job_id))

    async def _settle(
        self, role: Role, entity: Entity[Connection], reference: Reference, job: JobEndpoints | None
    ) -> None:
        assert reference.reserved_until is not None
        used_id = None if job is None else job.source_id if role == "source" else job.destination_id
        command: Confirm | Expire = (
            Confirm(reference.job_id, reference.job_name, self.clock.now())
            if used_id == entity.id
            else Expire(reference.job_id, reference.reserved_until)
        )
        act = Act(AGGREGATES[role], entity.id, command, ignore_refusal=True)
        await self.commands.execute(CommandRequest([act], Metadata(project_id=entity.state.project_id)))
        log.info(
            "reservation_settled",
            role=role,
            entity_id=entity.id,
            job_id=reference.job_id,
            outcome=type(command).__name__.lower(),
        )


def _number(grant: Mapping[str, Any], name: str) -> int:
    value = grant.get(name)
    if not isinstance(value, int):
        raise Forbidden(f"the grant names no {name}", code="invalid_grant")
    return value


def _ended(entity: Entity[Connection], ended_before: datetime) -> list[Reference]:
    return [
        item
        for item in entity.state.references
        if item.reserved_until is not None and item.reserved_until < ended_before
    ]


def _given(wanted: EndpointWanted) -> Given:
    fields = {"name": wanted.name, "type": wanted.type, "version": wanted.version, "config": wanted.config}
    if missing := [name for name, value in fields.items() if value is None]:
        errors = [FieldError(name, "is required without an id", "missing") for name in missing]
        raise InvalidInput("; ".join(f"{item.field}: {item.message}" for item in errors), errors=errors)
    assert wanted.name is not None
    assert wanted.type is not None
    assert wanted.version is not None
    assert wanted.config is not None
    try:
        name = canonical_name(wanted.name)
    except ValueError as error:
        raise invalid_field("name", str(error)) from None
    return Given(name, wanted.type, canonical_version(wanted.version), wanted.config)


def _reserved(entity: Entity[Connection] | None) -> EndpointReserved:
    assert entity is not None
    definition = entity.state.definition
    return EndpointReserved(
        id=int(entity.id),
        name=definition.name,
        type=definition.type,
        version=definition.version,
        config_json=definition.config_json,
    )


def _prefixed(role: Role, error: DataSyncError) -> DataSyncError:
    """The same refusal, naming its fields as the caller of the job knows them."""
    if error.errors:
        error.errors = tuple(replace(item, field=f"{role}.{item.field}") for item in error.errors)
        error.message = "; ".join(f"{item.field}: {item.message}" for item in error.errors)
    return error


def _versions_differ(source: str, destination: str) -> InvalidInput:
    message = f"must be the version of the source, {source}, and is {destination}"
    return InvalidInput(
        f"destination.version: {message}",
        code="version_mismatch",
        errors=[FieldError("destination.version", message, "version_mismatch")],
    )
