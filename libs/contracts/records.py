"""Events of ``datasync.records.v1``: developer sync records. Streams ``record-<uuid>``."""

from typing import ClassVar

from libs.contracts.registry import register
from libs.core.envelope import Event

TOPIC = "datasync.records.v1"


class RecordEvent(Event):
    """What every event of a record says, so that a reader needs no other: whose it is, and what it is about."""

    TOPIC: ClassVar[str] = TOPIC

    developer_id: str
    resource_type: str
    resource_key: str


class RecordCreated(RecordEvent):
    """A record was made.

    Args:
        data_json, metadata_json: JSON objects as compact text, their numbers as they were sent.
    """

    TYPE: ClassVar[str] = "record_created"

    data_json: str
    status: str
    metadata_json: str


class RecordUpdated(RecordEvent):
    """A record was written again; a field that was not written is None."""

    TYPE: ClassVar[str] = "record_updated"

    data_json: str | None = None
    status: str | None = None
    metadata_json: str | None = None


class RecordDeleted(RecordEvent):
    TYPE: ClassVar[str] = "record_deleted"


EVENTS = (RecordCreated, RecordUpdated, RecordDeleted)
register(EVENTS)
