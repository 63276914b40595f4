"""From a request's body to a job: its endpoints reserved at catalog, then created or changed."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from libs.contracts.internal import (
    RESERVE_ENDPOINTS,
    EndpointReserved,
    EndpointsReserved,
    EndpointWanted,
    ReserveEndpoints,
)
from libs.core.clock import Clock
from libs.core.decider import Act, ExpectedVersion
from libs.core.entity import Entity
from libs.core.envelope import Metadata
from libs.core.errors import Conflict, FieldError, InvalidInput
from libs.core.idempotency import IdempotencyKey
from libs.core.json import parse_json
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.documents import Documents
from libs.eventsourcing.requests import CommandRequest
from libs.mongodb.client import ASCENDING, IndexModel, ReturnDocument
from libs.mongodb.sequences import Sequences
from libs.web.internal import InternalClient
from services.job_orchestrator.domain.job import JOB, CreateJob, Definition, JobState, UpdateJob
from services.job_orchestrator.domain.streams import object_text, refuse_beyond
from services.job_orchestrator.queries import JobQueries, Side, reserved_endpoint
from services.job_orchestrator.run_control import key_was_used

KEYED_IDS = "job_ids_by_key"
KEYED_IDS_INDEXES = [IndexModel([("created_at", ASCENDING)], expireAfterSeconds=24 * 3600)]


@dataclass(frozen=True, slots=True)
class EndpointGiven:
    """A source or destination as a request names it: by ``id``, or by the fields of one to be made."""

    id: int | None
    name: str | None
    type: str | None
    version: str | None
    config: Any

    def wanted(self, side: Side) -> EndpointWanted:
        """What catalog is asked for; raises ``InvalidInput`` naming the missing fields."""
        if self.id is not None:
            return EndpointWanted(id=self.id)
        fields: Mapping[str, Any] = {
            "name": self.name,
            "type": self.type,
            "version": self.version,
            "config": self.config,
        }
        missing = [f"{side}.{name}" for name, value in fields.items() if value is None]
        if missing:
            message = f"missing without {side}.id: {', '.join(missing)}"
            raise InvalidInput(message, errors=[FieldError(field, "is missing", "missing") for field in missing])
        config = parse_json(object_text(self.config, f"{side}.config").encode(), subject=f"{side}.config")
        return EndpointWanted(name=self.name, type=self.type, version=self.version, config=config)


@dataclass(frozen=True, slots=True)
class JobGiven:
    """A job as a request gives it, its parts already checked one by one."""

    name: str
    source: EndpointGiven
    destination: EndpointGiven
    frequency: str
    streams_config_json: str
    advanced_settings_json: str
    activate: bool

    def definition(self, source_id: int, destination_id: int) -> Definition:
        return Definition(
            name=self.name,
            source_id=source_id,
            destination_id=destination_id,
            frequency=self.frequency,
            streams_config_json=self.streams_config_json,
            advanced_settings_json=self.advanced_settings_json,
            activate=self.activate,
        )


class JobWriting:
    """Creates and changes jobs."""

    def __init__(
        self,
        documents: Documents,
        commands: CommandHandler,
        queries: JobQueries,
        sequences: Sequences,
        internal: InternalClient,
        clock: Clock,
    ) -> None:
        self._documents = documents
        self._commands = commands
        self._queries = queries
        self._sequences = sequences
        self._internal = internal
        self._clock = clock

    async def create(
        self, project_id: int, given: JobGiven, metadata: Metadata, idempotency: IdempotencyKey | None
    ) -> Entity[JobState]:
        """Reserve both ends and create the job; with a key that was used before, the job that it made then."""
        job_id = await self._job_id(idempotency)
        create: CreateJob | None = None
        side_writes = []
        if not await key_was_used(self._documents, idempotency):
            if await self._queries.job_named(project_id, given.name) is not None:
                raise name_taken()
            reserved = await self._reserve(project_id, job_id, given, metadata)
            refuse_beyond(given.streams_config_json, reserved.source.type, reserved.destination.type)
            now = self._clock.now()
            definition = given.definition(reserved.source.id, reserved.destination.id)
            create = CreateJob(definition=definition, now=now, reserved_until=reserved.reserved_until)
            side_writes = [
                reserved_endpoint("source", project_id, reserved.source, now),
                reserved_endpoint("destination", project_id, reserved.destination, now),
            ]
        # Without a command the key's record answers: the request was carried out before.
        outcome = await self._commands.execute(
            CommandRequest([Act(JOB, job_id, create)], metadata, side_writes, idempotency)
        )
        job = outcome.entities[0]
        assert job is not None
        return job

    async def update(
        self,
        job: Entity[JobState],
        given: JobGiven,
        clear_streams_config_json: str | None,
        metadata: Metadata,
        *,
        expected_version: ExpectedVersion,
    ) -> Entity[JobState]:
        """Change the job; other ends than the present ones are reserved first."""
        project_id, before = job.state.project_id, job.state.definition
        source = await self._present("source", project_id, given.source)
        destination = await self._present("destination", project_id, given.destination)
        given = replace(given, source=source, destination=destination)
        side_writes = []
        source_id, destination_id = source.id, destination.id
        if (source_id, destination_id) != (before.source_id, before.destination_id):
            if given.name != before.name and await self._queries.job_named(project_id, given.name) is not None:
                raise name_taken()
            reserved = await self._reserve(project_id, int(job.id), given, metadata)
            refuse_beyond(given.streams_config_json, reserved.source.type, reserved.destination.type)
            source_id, destination_id = reserved.source.id, reserved.destination.id
            now = self._clock.now()
            side_writes = [
                reserved_endpoint("source", project_id, reserved.source, now),
                reserved_endpoint("destination", project_id, reserved.destination, now),
            ]
        assert source_id is not None
        assert destination_id is not None
        if not side_writes and given.streams_config_json != before.streams_config_json:
            types = await self._queries.endpoint_types(project_id, source_id, destination_id)
            if types is not None:
                refuse_beyond(given.streams_config_json, *types)
        command = UpdateJob(
            definition=given.definition(source_id, destination_id),
            clear_streams_config_json=clear_streams_config_json,
        )
        return await self._commands.handle(
            JOB, job.id, command, metadata, expected_version=expected_version, side_writes=side_writes
        )

    async def _present(self, side: Side, project_id: int, given: EndpointGiven) -> EndpointGiven:
        """The given end by id where it names one that exists: the seed's PUT has no ids, only names."""
        if given.id is not None or given.name is None:
            return given
        known = await self._queries.endpoint_named(side, project_id, given.name)
        return given if known is None else EndpointGiven(known, None, None, None, None)

    async def _reserve(self, project_id: int, job_id: int, given: JobGiven, metadata: Metadata) -> EndpointsReserved:
        request = ReserveEndpoints(
            project_id=project_id,
            job_id=job_id,
            job_name=given.name,
            actor=metadata.actor,
            source=given.source.wanted("source"),
            destination=given.destination.wanted("destination"),
        )
        reserved = await self._internal.call(RESERVE_ENDPOINTS, request)
        if reserved.source.version != reserved.destination.version:
            raise _versions_differ(reserved.source, reserved.destination)
        return reserved

    async def _job_id(self, idempotency: IdempotencyKey | None) -> int:
        """A new id; the same one for the same key, so that a repeated request finds its own reservation."""
        job_id = await self._sequences.next("job")
        if idempotency is None:
            return job_id
        kept = await self._documents.plain(KEYED_IDS).find_one_and_update(
            {"_id": idempotency.id},
            {"$setOnInsert": {"job_id": job_id, "created_at": self._clock.now()}},
            upsert=True,
            return_document=ReturnDocument.AFTER,
        )
        return int(kept["job_id"])


def name_taken() -> Conflict:
    """The refusal of a second job of one name."""
    return Conflict(
        JOB.conflict_message,
        code="already_exists",
        errors=[FieldError(JOB.conflict_field, JOB.conflict_message, "taken")],
    )


def _versions_differ(source: EndpointReserved, destination: EndpointReserved) -> InvalidInput:
    message = (
        f"the source's version is {source.version} and the destination's {destination.version}; "
        "a job needs the same version on both sides"
    )
    return InvalidInput(message, code="version_mismatch", errors=[FieldError("destination.version", message)])
