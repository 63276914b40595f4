"""What callers see of records, their events and their changes; free-form JSON is spliced in as it is kept."""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, NotRequired

import orjson
from pydantic import Field
from typing_extensions import TypedDict

from libs.contracts.records import RecordEvent
from libs.core.entity import Entity
from libs.core.envelope import Envelope
from libs.core.errors import DataSyncError
from libs.web.answers import FieldErrorShown, Moment, RawObject, field_errors_view
from services.record_sync.domain.record import Record

RECORD_ID = "01980f0a-7c1e-7d54-9f2b-1f2e5a7c9d10"

Id = Annotated[str, Field(examples=[RECORD_ID])]
DeveloperId = Annotated[str, Field(examples=["dev-789"])]
ResourceType = Annotated[str, Field(examples=["FEATURE_FLAG_STATE"])]
ResourceKey = Annotated[str, Field(examples=["flag-migration-v2"])]
Status = Annotated[str, Field(examples=["ACTIVE"])]


class RecordShown(TypedDict):
    """A developer sync record; ``lastSyncedAt`` is null until a write that leaves the status ACTIVE."""

    id: Id
    developerId: DeveloperId
    resourceType: ResourceType
    resourceKey: ResourceKey
    data: Annotated[RawObject, Field(examples=[{"enabled": False}])]
    lastSyncedAt: Moment | None
    status: Status
    createdAt: Moment
    updatedAt: Moment
    metadata: RawObject


class RecordsShown(TypedDict):
    """One page, newest first; ``total`` counts all that match."""

    total: Annotated[int, Field(ge=0)]
    page: Annotated[int, Field(ge=1)]
    limit: Annotated[int, Field(ge=1, le=100, examples=[50])]
    data: list[RecordShown]


class FieldsWritten(TypedDict):
    """What an event wrote; a field that is left out stayed as it was."""

    data: NotRequired[RawObject]
    status: NotRequired[Status]
    metadata: NotRequired[RawObject]


class RecordEventShown(TypedDict):
    id: Id
    type: Annotated[str, Field(examples=["record_updated"])]
    version: Annotated[int, Field(ge=1)]
    time: Moment
    actor: Annotated[str, Field(examples=["nightly export"])]
    changes: FieldsWritten


class RecordHistory(TypedDict):
    """Newest first."""

    data: list[RecordEventShown]


class ChangeShown(RecordEventShown):
    """An event with its position in the feed, and the record that it is about."""

    position: Annotated[int, Field(ge=1)]
    recordId: Id
    developerId: DeveloperId
    resourceType: ResourceType
    resourceKey: ResourceKey


class ChangesShown(TypedDict):
    """Changes in order; ``cursor`` is the ``after`` of the next call."""

    data: list[ChangeShown]
    cursor: Annotated[int, Field(ge=0)]
    hasMore: bool


class OperationError(TypedDict):
    code: Annotated[str, Field(examples=["already_exists"])]
    detail: str
    errors: list[FieldErrorShown]


class OperationResult(TypedDict):
    """The outcome of one operation: its status, and the record or the error."""

    status: Annotated[int, Field(ge=200, le=599, examples=[201])]
    id: NotRequired[Id]
    version: NotRequired[int]
    record: NotRequired[RecordShown]
    error: NotRequired[OperationError]


class BatchShown(TypedDict):
    """The results in the order of the operations."""

    results: list[OperationResult]


def record_view(entity: Entity[Record]) -> RecordShown:
    return stored_view(entity.id, vars(entity.state))


def stored_view(identifier: int | str, state: Mapping[str, Any]) -> RecordShown:
    """A record from its stored state: a list does not validate every record that it reads."""
    last_synced_at: datetime | None = state["last_synced_at"]
    return {
        "id": str(identifier),
        "developerId": state["developer_id"],
        "resourceType": state["resource_type"],
        "resourceKey": state["resource_key"],
        "data": orjson.Fragment(state["data_json"]),
        "lastSyncedAt": last_synced_at,
        "status": state["status"],
        "createdAt": state["created_at"],
        "updatedAt": state["updated_at"],
        "metadata": orjson.Fragment(state["metadata_json"]),
    }


def event_view(envelope: Envelope) -> RecordEventShown:
    """An event of a record's history."""
    return {
        "id": envelope.id,
        "type": envelope.type,
        "version": envelope.version,
        "time": envelope.time,
        "actor": envelope.metadata.actor,
        "changes": _written(envelope),
    }


def change_view(envelope: Envelope) -> ChangeShown:
    """An event of the change feed."""
    event = envelope.data
    assert isinstance(event, RecordEvent)
    return {
        "position": envelope.position,
        "recordId": envelope.entity_id,
        "developerId": event.developer_id,
        "resourceType": event.resource_type,
        "resourceKey": event.resource_key,
        **event_view(envelope),
    }


def result_view(result: Entity[Record] | DataSyncError, status: int) -> OperationResult:
    """The outcome of one operation of a batch."""
    if isinstance(result, DataSyncError):
        errors = field_errors_view(result.errors)
        return {"status": result.status, "error": {"code": result.code, "detail": result.message, "errors": errors}}
    if status == 204:
        return {"status": status, "id": str(result.id)}
    record = record_view(result)
    return {"status": status, "id": record["id"], "version": result.version, "record": record}


def _written(envelope: Envelope) -> FieldsWritten:
    written = envelope.data.model_dump(include={"data_json", "status", "metadata_json"}, exclude_none=True)
    shown: FieldsWritten = {}
    if "status" in written:
        shown["status"] = written["status"]
    if "data_json" in written:
        shown["data"] = orjson.Fragment(written["data_json"])
    if "metadata_json" in written:
        shown["metadata"] = orjson.Fragment(written["metadata_json"])
    return shown
