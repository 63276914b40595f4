"""What callers send: validated field by field; ``data`` and ``metadata`` are stored as the text that was sent.

A JSON library would change their numbers (``1.10``, thirty digits after the point), so the members of the body are cut
out of it as they stand; only white space and the escapes of strings are made one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import orjson
from aiohttp import web
from pydantic import BaseModel, Field, ValidationError

from libs.core.decider import ExpectedVersion
from libs.core.errors import FieldError, InvalidInput
from libs.core.json import is_json, parse_json, raw_items, raw_members
from libs.web.body import read_bytes
from libs.web.inputs import HistoryQuery, OneQuery, StrictBody, StrictQuery
from libs.web.requests import invalid_input, read_raw_json, require_json
from services.record_sync.domain.record import ACTIVE, CreateRecord, DeleteRecord, UpdateRecord

METADATA_BYTES_MAX = 1024
OPERATIONS_MAX = 1_000
LIMIT_MAX = 100
PAGE_MAX = 10**9
POSITION_MAX = 2**53
CHANGES_MAX = 1_000
WAIT_SECONDS_MAX = 60

Name = Annotated[str, Field(min_length=1, max_length=128)]
ResourceKey = Annotated[str, Field(min_length=1, max_length=512)]
Status = Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]{0,63}$")]

_IMMUTABLE = frozenset({"developerId", "resourceType", "resourceKey"})
_SYSTEM_GENERATED = frozenset({"id", "lastSyncedAt", "createdAt", "updatedAt"})
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')

ModelT = TypeVar("ModelT", bound=BaseModel)
Members = Mapping[str, msgspec.Raw]


class CreateBody(StrictBody):
    developer_id: Name = Field(alias="developerId", examples=["dev-789"])
    resource_type: Name = Field(alias="resourceType", examples=["FEATURE_FLAG_STATE"])
    resource_key: ResourceKey = Field(alias="resourceKey", examples=["flag-migration-v2"])
    data: dict[str, Any] = Field(examples=[{"enabled": False, "notes": "Initial state for migration flag."}])
    status: Status = ACTIVE
    metadata: dict[str, Any] = Field(default_factory=dict)


class UpdateBody(StrictBody):
    """A field that is left out stays as it is; there is no null."""

    data: dict[str, Any] = Field(default_factory=dict, examples=[{"enabled": True}])
    status: Status = Field(default=ACTIVE, examples=["PENDING_SYNC_CONFIRMATION"])
    metadata: dict[str, Any] = Field(default_factory=dict)


class CreateOperation(StrictBody):
    op: Literal["create"]
    record: dict[str, Any] = Field(
        examples=[
            {
                "developerId": "dev-789",
                "resourceType": "FEATURE_FLAG_STATE",
                "resourceKey": "flag-migration-v2",
                "data": {"enabled": False},
            }
        ]
    )


class UpdateOperation(StrictBody):
    op: Literal["update"]
    id: str = Field(min_length=1)
    changes: dict[str, Any]
    if_match: int | None = Field(default=None, alias="ifMatch", ge=1, le=POSITION_MAX)


class DeleteOperation(StrictBody):
    op: Literal["delete"]
    id: str = Field(min_length=1)
    if_match: int | None = Field(default=None, alias="ifMatch", ge=1, le=POSITION_MAX)


class BatchOfOperations(StrictBody):
    """What a batch holds; each operation is checked by itself."""

    operations: list[Annotated[CreateOperation | UpdateOperation | DeleteOperation, Field(discriminator="op")]] = Field(
        min_length=1, max_length=OPERATIONS_MAX
    )


class BatchBody(StrictBody):
    """A batch before its operations are validated."""

    operations: list[Any] = Field(min_length=1, max_length=OPERATIONS_MAX)


class ListQuery(StrictQuery):
    developer_id: Name | None = Field(default=None, alias="developerId")
    resource_type: Name | None = Field(default=None, alias="resourceType")
    status: Status | None = None
    limit: int = Field(default=50, ge=1, le=LIMIT_MAX)
    page: int = Field(default=1, ge=1, le=PAGE_MAX)


class OneRecordQuery(OneQuery, StrictQuery):
    pass


class RecordHistoryQuery(HistoryQuery, StrictQuery):
    pass


class ChangesQuery(StrictQuery):
    """``after``: the cursor of the last answer, or ``latest`` for what comes from now on."""

    after: Annotated[int, Field(ge=0, le=POSITION_MAX)] | Literal["latest"] = 0
    developer_id: Name | None = Field(default=None, alias="developerId")
    resource_type: Name | None = Field(default=None, alias="resourceType")
    limit: int = Field(default=LIMIT_MAX, ge=1, le=CHANGES_MAX)
    timeout: float = Field(default=0, ge=0, le=WAIT_SECONDS_MAX)


@dataclass(frozen=True, slots=True)
class Operation:
    """One of a batch.

    Args:
        record_id: which record; None makes one.
    """

    command: CreateRecord | UpdateRecord | DeleteRecord
    record_id: str | None = None
    expected_version: ExpectedVersion = None


Operations = Sequence[tuple[Operation | InvalidInput, int]]


async def read_creation(request: web.Request) -> CreateRecord:
    """The body of POST."""
    fields = await read_raw_json(request)
    return _creation(fields, await read_bytes(request))


async def read_update(request: web.Request) -> UpdateRecord:
    """The body of PATCH."""
    fields = await read_raw_json(request)
    return _update(fields, await read_bytes(request))


async def read_operations(request: web.Request) -> Operations:
    """The operations of a batch, each with the status of its success; an invalid one is its refusal.

    Raises:
        InvalidInput: the body as a whole is not a batch.
    """
    require_json(request)
    members = raw_members(await read_bytes(request))
    frame: dict[str, Any] = dict(members)
    if "operations" in members:
        frame["operations"] = raw_items(members["operations"])
    operations = [_operation_or_refusal(text) for text in _checked(BatchBody, frame).operations]
    return [(operation, _success_of(operation)) for operation in operations]


def _success_of(operation: Operation | InvalidInput) -> int:
    match operation:
        case Operation(command=CreateRecord()):
            return 201
        case Operation(command=DeleteRecord()):
            return 204
        case _:
            return 200


def compact(text: bytes) -> str:
    """JSON without white space, its strings in UTF-8 with the fewest escapes, its numbers as they are."""
    compacted = msgspec.json.format(text, indent=-1)
    if b"\\" in compacted:
        compacted = _STRING.sub(_unescaped, compacted)
    return compacted.decode()


def _operation_or_refusal(text: bytes) -> Operation | InvalidInput:
    try:
        return _operation(text)
    except InvalidInput as refusal:
        if refusal.code == "malformed_json" and not is_json(text):
            # Then the whole body is not JSON, and the boundaries of its operations are unknown.
            raise
        return refusal


def _operation(text: bytes) -> Operation:
    """Each operation is validated on its own; its data may be nested as deeply as in a single request."""
    fields = parse_json(text, subject="the operation", wrapped=1)
    if not isinstance(fields, dict):
        raise _refused("operation", "must be a JSON object")
    raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    match fields.get("op"):
        case "create":
            _checked(CreateOperation, fields)
            return Operation(_creation(fields["record"], bytes(raw["record"]), "record"))
        case "update":
            update = _checked(UpdateOperation, fields)
            command = _update(update.changes, bytes(raw["changes"]), "changes")
            return Operation(command, update.id, update.if_match)
        case "delete":
            delete = _checked(DeleteOperation, fields)
            return Operation(DeleteRecord(), delete.id, delete.if_match)
        case _:
            raise _refused("op", "must be create, update or delete")


def _creation(fields: Any, body: bytes, path: str = "") -> CreateRecord:
    checked = _checked(CreateBody, fields, path)
    members = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    return CreateRecord(
        developer_id=checked.developer_id,
        resource_type=checked.resource_type,
        resource_key=checked.resource_key,
        data_json=compact(bytes(members["data"])),
        status=checked.status,
        metadata_json=_metadata(members, path) or "{}",
    )


def _update(fields: Any, body: bytes, path: str = "") -> UpdateRecord:
    checked = _checked(UpdateBody, fields, path)
    members = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    return UpdateRecord(
        data_json=compact(bytes(members["data"])) if "data" in members else None,
        status=checked.status if "status" in members else None,
        metadata_json=_metadata(members, path),
    )


def _metadata(members: Members, path: str) -> str | None:
    if "metadata" not in members:
        return None
    text = compact(bytes(members["metadata"]))
    size_bytes = len(text.encode())
    if size_bytes > METADATA_BYTES_MAX:
        field = f"{path}.metadata" if path else "metadata"
        message = f"is {size_bytes} bytes of compact JSON; at most {METADATA_BYTES_MAX} are allowed"
        raise _refused(field, message, "too_large")
    return text


def _checked(model: type[ModelT], fields: Any, path: str = "") -> ModelT:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        refusal = invalid_input(error)
    errors = [_explained(item, path, is_update=model is UpdateBody) for item in refusal.errors]
    message = "; ".join(f"{item.field or 'the body'}: {item.message}" for item in errors[:5])
    raise InvalidInput(message, errors=errors)


def _explained(error: FieldError, path: str, *, is_update: bool) -> FieldError:
    """The error with its full path; for fields that exist but can't be written, the reason."""
    message, code = error.message, error.code
    if code == "unknown_field" and error.field in _SYSTEM_GENERATED:
        message, code = "is set by the system", "read_only_field"
    elif code == "unknown_field" and is_update and error.field in _IMMUTABLE:
        message, code = "can't be changed", "immutable_field"
    field = ".".join(part for part in (path, error.field) if part)
    return FieldError(field, message, code)


def _refused(field: str, message: str, code: str = "invalid") -> InvalidInput:
    return InvalidInput(f"{field}: {message}", errors=[FieldError(field, message, code)])


def _unescaped(matched: re.Match[bytes]) -> bytes:
    token = matched[0]
    return orjson.dumps(orjson.loads(token)) if b"\\" in token else token
