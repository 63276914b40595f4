"""Events of ``datasync.catalog.v1``: sources and destinations. Streams ``source-<int>``, ``destination-<int>``."""

from datetime import datetime
from typing import ClassVar

from libs.contracts.registry import register
from libs.core.envelope import Event

TOPIC = "datasync.catalog.v1"


class CatalogEvent(Event):
    TOPIC: ClassVar[str] = TOPIC


class ConnectionDefined(CatalogEvent):
    """What a source or destination is.

    Args:
        config_json: the configuration as JSON text, every secret replaced by its masked reference.
        secret_ref: the id of the stored secrets, None where the configuration has none.
    """

    name: str
    type: str
    version: str
    config_json: str
    secret_ref: str | None = None


class SourceCreated(ConnectionDefined):
    TYPE: ClassVar[str] = "source_created"


class SourceUpdated(ConnectionDefined):
    TYPE: ClassVar[str] = "source_updated"


class DestinationCreated(ConnectionDefined):
    TYPE: ClassVar[str] = "destination_created"


class DestinationUpdated(ConnectionDefined):
    TYPE: ClassVar[str] = "destination_updated"


class ConnectionReferenced(CatalogEvent):
    """A job holds on to it; unless the job appears by ``reserved_until``, the reservation is released."""

    job_id: int
    job_name: str
    reserved_until: datetime


class ReferenceConfirmed(CatalogEvent):
    """The job that reserved it exists."""

    job_id: int


class ReferenceReleased(CatalogEvent):
    """The job no longer uses it, or never appeared."""

    job_id: int


class SourceReferenced(ConnectionReferenced):
    TYPE: ClassVar[str] = "source_referenced"


class SourceReferenceConfirmed(ReferenceConfirmed):
    TYPE: ClassVar[str] = "source_reference_confirmed"


class SourceReleased(ReferenceReleased):
    TYPE: ClassVar[str] = "source_released"


class DestinationReferenced(ConnectionReferenced):
    TYPE: ClassVar[str] = "destination_referenced"


class DestinationReferenceConfirmed(ReferenceConfirmed):
    TYPE: ClassVar[str] = "destination_reference_confirmed"


class DestinationReleased(ReferenceReleased):
    TYPE: ClassVar[str] = "destination_released"


class SourceDeleted(CatalogEvent):
    TYPE: ClassVar[str] = "source_deleted"


class DestinationDeleted(CatalogEvent):
    TYPE: ClassVar[str] = "destination_deleted"


EVENTS = (
    SourceCreated,
    SourceUpdated,
    SourceReferenced,
    SourceReferenceConfirmed,
    SourceReleased,
    SourceDeleted,
    DestinationCreated,
    DestinationUpdated,
    DestinationReferenced,
    DestinationReferenceConfirmed,
    DestinationReleased,
    DestinationDeleted,
)
register(EVENTS)
