"""The records that a call may touch, and batches whose operations succeed or fail independently."""

import asyncio
import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import structlog
from pydantic import Field

from libs.core.entity import Entity
from libs.core.errors import CallOperator, DataSyncError, FieldError, Forbidden, TooLarge, Unprocessable
from libs.core.idempotency import IdempotencyKey
from libs.core.ids import uuid7
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.documents import Documents
from libs.web.calls import Call
from libs.web.entities import Entities, IdKind
from libs.web.errors import INTERNAL_MESSAGE
from services.record_sync.answers import RECORD_ID
from services.record_sync.domain.record import RECORD, Command, CreateRecord, Record
from services.record_sync.inputs import Operation

log = structlog.get_logger(__name__)


class Records(Entities[Record]):
    """The developer sync records that a call may touch."""

    def __init__(self, documents: Documents, commands: CommandHandler) -> None:
        super().__init__(RECORD, documents, commands, ids=RECORD_IDS, permit=_permit, not_found_code="record_not_found")

    async def create(self, call: Call, command: CreateRecord, record_id: str | None = None) -> Entity[Record]:
        """Create a record; raises ``Conflict`` if another record has its key."""
        require_developer(call, command.developer_id)
        return await self.handle(call, record_id or uuid7(), command)

    async def handle(self, call: Call, entity_id: int | str, command: Command) -> Entity[Record]:
        try:
            return await super().handle(call, entity_id, command)
        except TooLarge as error:
            message = error.errors[0].message
            raise TooLarge(f"data: {message}", errors=[FieldError("data", message, "too_large")]) from error

    async def batch(
        self, call: Call, operations: Sequence[Operation | DataSyncError]
    ) -> Sequence[Entity[Record] | DataSyncError]:
        """Perform the operations in order; a failed operation does not affect the others.

        With an Idempotency-Key each operation is remembered by its place: a repeated batch performs only what failed.

        Raises:
            Unprocessable: the key was used with another batch.
        """
        keys = _keys_of(call.idempotency, len(operations))
        await self._require_same_batch(keys)
        # All look-ups come first, so that the commands are then queued in their order without an await between them.
        allowed = await asyncio.gather(*(self._allowed(call, operation) for operation in operations))
        performed = (self._perform(call, operation, key) for operation, key in zip(allowed, keys, strict=True))
        return [_result(item) for item in await asyncio.gather(*performed, return_exceptions=True)]

    async def _allowed(self, call: Call, operation: Operation | DataSyncError) -> Operation | DataSyncError:
        if isinstance(operation, DataSyncError):
            return operation
        try:
            if isinstance(operation.command, CreateRecord):
                require_developer(call, operation.command.developer_id)
            else:
                # The first attempt of a repeated batch may have deleted it; the command decides.
                await self.named(call, operation.record_id or "", deleted_too=True)
        except DataSyncError as refusal:
            return refusal
        return operation

    async def _perform(
        self, call: Call, operation: Operation | DataSyncError, key: IdempotencyKey | None
    ) -> Entity[Record]:
        if isinstance(operation, DataSyncError):
            raise operation
        record_id = record_id_of(operation.record_id or "") or uuid7()
        own = replace(call, expected_version=operation.expected_version, idempotency=key)
        return await self.handle(own, record_id, operation.command)

    async def _require_same_batch(self, keys: Sequence[IdempotencyKey | None]) -> None:
        wanted = {key.id: key.request_hash for key in keys if key is not None}
        if not wanted:
            return
        known = self.documents.plain("idempotency").find({"_id": {"$in": list(wanted)}}, {"request_hash": 1})
        async for record in known:
            if record["request_hash"] != wanted[record["_id"]]:
                raise Unprocessable("this Idempotency-Key was used with another request")


def require_developer(call: Call, developer_id: str | None) -> None:
    """Raises ``Forbidden`` for another developer than the one that the credential is bound to."""
    bound_to = call.caller.developer_id
    if bound_to is not None and developer_id not in (None, bound_to):
        message = "this key is bound to another developer"
        raise Forbidden(message, code="other_developer", errors=[FieldError("developerId", message)])


def record_id_of(text: str) -> str | None:
    """A record's id as it is stored, None if the text is no UUID in its usual form."""
    try:
        identifier = str(uuid.UUID(text))
    except ValueError:
        return None
    return identifier if identifier == text.lower() else None


RECORD_IDS = IdKind(
    record_id_of, r":(?!changes(?:/|$))[^/]+", Annotated[str, Field(min_length=1, examples=[RECORD_ID])]
)


async def _permit(call: Call, record: Entity[Record]) -> bool:
    if record.state.project_id != call.project_id:
        raise Forbidden("the record belongs to another project", code="other_project")
    require_developer(call, record.state.developer_id)
    return True


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
