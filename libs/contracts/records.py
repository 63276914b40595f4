"""Events of ``datasync.records.v1``: developer sync records. Streams ``record-<uuid>``."""

from libs.contracts.registry import PublicEvent

TOPIC = "datasync.records.v1"


class RecordEvent(PublicEvent, topic=TOPIC):
    """The fields that every event of a record has, so that a reader needs no earlier event to know the record.

    Args:
        developer_id: the developer to whom the record belongs.
        resource_type: the kind of resource that the record is about.
        resource_key: the resource's key among those of its kind.
    """

    developer_id: str
    resource_type: str
    resource_key: str


class RecordCreated(RecordEvent):
    """A record was created.

    Args:
        data_json, metadata_json: a JSON object as compact text; numbers are as the client sent them.
    """

    data_json: str
    status: str
    metadata_json: str


class RecordUpdated(RecordEvent):
    """A record was updated.

    Args:
        data_json, metadata_json: the new JSON object as compact text; absent if it was not written.
        status: the new status; absent if it was not written.
    """

    data_json: str | None = None
    status: str | None = None
    metadata_json: str | None = None


class RecordDeleted(RecordEvent):
    """A record was deleted."""
