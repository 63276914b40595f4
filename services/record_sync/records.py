"""Writing records: what a caller may touch, and batches whose operations stand each for itself."""

import asyncio
import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from libs.core.decider import ExpectedVersion
from libs.core.envelope import Metadata
from libs.core.errors import (
    CallOperator,
    DataSyncError,
    FieldError,
    Forbidden,
    NotFound,
    TooLarge,
    Unprocessable,
)
from libs.core.ids import uuid7
from libs.eventsourcing.command_handler import CommandHandler, Entity, IdempotencyKey
from libs.eventsourcing.documents import Documents
from libs.web.errors import INTERNAL_MESSAGE
from services.record_sync.domain.record import RECORD, CreateRecord, DeleteRecord, Record, UpdateRecord
from services.record_sync.inputs import Operation

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    """On whose behalf: a project and, where the key is bound to one, a single developer of it."""

    project_id: int
    developer_id: str | None
    metadata: Metadata

    def require_developer(self, developer_id: str | None) -> None:
        """Raises ``Forbidden`` for another developer than the one that the key is bound to."""
        if self.developer_id is not None and developer_id not in (None, self.developer_id):
            message = "this key is bound to another developer"
            raise Forbidden(message, code="other_developer", errors=[FieldError("developerId", message)])


class Records:
    """The commands on records.

    Args:
        documents, commands: the service's own.
    """

    def __init__(self, documents: Documents, commands: CommandHandler) -> None:
        self._documents = documents
        self._commands = commands

    async def require(self, caller: Caller, record_id: str, *, deleted_too: bool = False) -> Entity[Record]:
        """A record that the caller may see.

        Raises:
            NotFound: there is none, or it was deleted.
            Forbidden: it belongs to another project, or to another developer than the key is bound to.
        """
        identifier = record_id_of(record_id)
        entity = None if identifier is None else await self._documents.get(RECORD, identifier)
        if entity is None or (entity.state.deleted and not deleted_too):
            raise NotFound(f"record {record_id[:64]} does not exist", code="record_not_found")
        if entity.state.project_id != caller.project_id:
            raise Forbidden("the record belongs to another project", code="other_project")
        caller.require_developer(entity.state.developer_id)
        return entity

    async def create(
        self, caller: Caller, command: CreateRecord, idempotency: IdempotencyKey | None = None
    ) -> Entity[Record]:
        """Make a record; raises ``Conflict`` when its key is taken."""
        caller.require_developer(command.developer_id)
        return await self._handle(caller, uuid7(), command, None, idempotency)

    async def update(
        self, caller: Caller, record_id: str, command: UpdateRecord, expected_version: ExpectedVersion
    ) -> Entity[Record]:
        entity = await self.require(caller, record_id)
        return await self._handle(caller, str(entity.id), command, expected_version)

    async def delete(self, caller: Caller, record_id: str, expected_version: ExpectedVersion) -> Entity[Record]:
        entity = await self.require(caller, record_id)
        return await self._handle(caller, str(entity.id), DeleteRecord(), expected_version)

    async def batch(
        self,
        caller: Caller,
        operations: Sequence[Operation | DataSyncError],
        idempotency: IdempotencyKey | None,
    ) -> Sequence[Entity[Record] | DataSyncError]:
        """Perform the operations in their order, each by itself: what one comes to does not touch the others.

        With an Idempotency-Key each operation is remembered by its place, so that a repeated batch repeats nothing
        that was done; what was refused is tried again.

        Raises:
            Unprocessable: the key came with another batch before.
        """
        keys = _keys_of(idempotency, len(operations))
        await self._require_same_batch(keys)
        # Everything is looked up first, so that the commands are handed over in their order, without a pause.
        allowed = await asyncio.gather(*(self._allowed(caller, operation) for operation in operations))
        performed = (self._perform(caller, operation, key) for operation, key in zip(allowed, keys, strict=True))
        return [_result(item) for item in await asyncio.gather(*performed, return_exceptions=True)]

    async def _allowed(self, caller: Caller, operation: Operation | DataSyncError) -> Operation | DataSyncError:
        if isinstance(operation, DataSyncError):
            return operation
        try:
            if isinstance(operation.command, CreateRecord):
                caller.require_developer(operation.command.developer_id)
            else:
                # A repeated batch may have deleted it the first time; the command itself knows.
                await self.require(caller, operation.record_id or "", deleted_too=True)
        except DataSyncError as refusal:
            return refusal
        return operation

    async def _perform(
        self, caller: Caller, operation: Operation | DataSyncError, key: IdempotencyKey | None
    ) -> Entity[Record]:
        if isinstance(operation, DataSyncError):
            raise operation
        record_id = record_id_of(operation.record_id or "") or uuid7()
        return await self._handle(caller, record_id, operation.command, operation.expected_version, key)

    async def _handle(
        self,
        caller: Caller,
        record_id: str,
        command: CreateRecord | UpdateRecord | DeleteRecord,
        expected_version: ExpectedVersion,
        idempotency: IdempotencyKey | None = None,
    ) -> Entity[Record]:
        try:
            return await self._commands.handle(
                RECORD,
                record_id,
                command,
                caller.metadata,
                expected_version=expected_version,
                idempotency=idempotency,
            )
        except TooLarge as error:
            message = error.errors[0].message
            raise TooLarge(f"data: {message}", errors=[FieldError("data", message, "too_large")]) from error

    async def _require_same_batch(self, keys: Sequence[IdempotencyKey | None]) -> None:
        wanted = {key.id: key.request_hash for key in keys if key is not None}
        if not wanted:
            return
        known = self._documents.plain("idempotency").find({"_id": {"$in": list(wanted)}}, {"request_hash": 1})
        async for record in known:
            if record["request_hash"] != wanted[record["_id"]]:
                raise Unprocessable("this Idempotency-Key was used with another request")


def record_id_of(text: str) -> str | None:
    """A record's id as it is kept, None for what can't be one."""
    try:
        identifier = str(uuid.UUID(text))
    except ValueError:
        return None
    return identifier if identifier == text.lower() else None


def _keys_of(idempotency: IdempotencyKey | None, count: int) -> list[IdempotencyKey | None]:
    if idempotency is None:
        return [None] * count
    identities = (hashlib.sha256(f"{idempotency.id}/{index}".encode()).hexdigest() for index in range(count))
    return [IdempotencyKey(identity, idempotency.request_hash) for identity in identities]


def _result(item: Entity[Record] | BaseException) -> Entity[Record] | DataSyncError:
    match item:
        case Entity() | DataSyncError():
            return item
        case Exception():
            log.error("batch_operation_crashed", error=repr(item), exc_info=item)
            return CallOperator(INTERNAL_MESSAGE)
        case _:
            raise item
