"""What the answers about records hold, for the API's description."""

from typing import Any

from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

from libs.web.openapi import Answered, ErrorField, Moment

RECORD_ID = "01980f0a-7c1e-7d54-9f2b-1f2e5a7c9d10"


class SyncAnswered(Answered):
    """What this family answers, its names in camel case."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)


class RecordShown(SyncAnswered):
    """A developer sync record; ``lastSyncedAt`` is null until a write that leaves the status ACTIVE."""

    id: str = Field(examples=[RECORD_ID])
    developer_id: str = Field(examples=["dev-789"])
    resource_type: str = Field(examples=["FEATURE_FLAG_STATE"])
    resource_key: str = Field(examples=["flag-migration-v2"])
    data: dict[str, Any] = Field(examples=[{"enabled": False}])
    last_synced_at: Moment | None
    status: str = Field(examples=["ACTIVE"])
    created_at: Moment
    updated_at: Moment
    metadata: dict[str, Any]


class RecordsShown(SyncAnswered):
    """One page, newest first; ``total`` counts all that match."""

    total: int = Field(ge=0)
    page: int = Field(ge=1)
    limit: int = Field(ge=1, le=100, examples=[50])
    data: list[RecordShown]


class FieldsWritten(SyncAnswered):
    """What an event wrote; a field that is left out stayed as it was."""

    data: dict[str, Any] | None = None
    status: str | None = Field(default=None, examples=["ACTIVE"])
    metadata: dict[str, Any] | None = None


class RecordEventShown(SyncAnswered):
    id: str = Field(examples=[RECORD_ID])
    type: str = Field(examples=["record_updated"])
    version: int = Field(ge=1)
    time: Moment
    actor: str = Field(examples=["nightly export"])
    changes: FieldsWritten


class RecordHistory(SyncAnswered):
    """Newest first."""

    data: list[RecordEventShown]


class ChangeShown(RecordEventShown):
    """An event with its position in the feed, and the record that it is about."""

    position: int = Field(ge=1)
    record_id: str = Field(examples=[RECORD_ID])
    developer_id: str = Field(examples=["dev-789"])
    resource_type: str = Field(examples=["FEATURE_FLAG_STATE"])
    resource_key: str = Field(examples=["flag-migration-v2"])


class ChangesShown(SyncAnswered):
    """Changes in order; ``cursor`` is the ``after`` of the next call."""

    data: list[ChangeShown]
    cursor: int = Field(ge=0)
    has_more: bool


class OperationError(SyncAnswered):
    code: str = Field(examples=["already_exists"])
    detail: str
    errors: list[ErrorField]


class OperationResult(SyncAnswered):
    """What became of one operation: its status, and the record or the error."""

    status: int = Field(ge=200, le=599, examples=[201])
    id: str | None = Field(default=None, examples=[RECORD_ID])
    version: int | None = None
    record: RecordShown | None = None
    error: OperationError | None = None


class BatchShown(SyncAnswered):
    """The results in the order of the operations."""

    results: list[OperationResult]
