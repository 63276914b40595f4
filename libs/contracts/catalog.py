"""Events of ``datasync.catalog.v1``: sources and destinations. Streams ``source-<int>``, ``destination-<int>``."""

from datetime import datetime

from libs.contracts.registry import PublicEvent

TOPIC = "datasync.catalog.v1"


class CatalogEvent(PublicEvent, topic=TOPIC):
    pass


class ConnectionDefined(CatalogEvent, registered=False):
    """The configuration of a source or destination.

    Args:
        type: the connector, such as ``postgres``.
        version: the connector's version.
        config_json: the configuration as JSON text, with a reference in place of every secret.
        secret_ref: the id of the stored secrets; absent if the configuration has none.
    """

    name: str
    type: str
    version: str
    config_json: str
    secret_ref: str | None = None


class ConnectionReferenced(CatalogEvent, registered=False):
    """A job reserved a source or destination.

    Args:
        reserved_until: the reservation is released at this time unless the job exists by then.
    """

    job_id: int
    job_name: str
    reserved_until: datetime


class ReferenceConfirmed(CatalogEvent, registered=False):
    """The job of a reservation exists."""

    job_id: int


class ReferenceReleased(CatalogEvent, registered=False):
    """A job no longer uses a source or destination."""

    job_id: int


class SourceCreated(ConnectionDefined):
    """A source was created."""


class SourceUpdated(ConnectionDefined):
    """A source was changed. The event contains all of its fields, unchanged ones included."""


class SourceReferenced(ConnectionReferenced):
    """A job reserved the source. A source that a job has reserved or uses cannot be deleted."""


class SourceReferenceConfirmed(ReferenceConfirmed):
    """The job that reserved the source exists: the reservation no longer expires."""


class SourceReleased(ReferenceReleased):
    """A job no longer uses the source, or its reservation expired before the job existed."""


class SourceDeleted(CatalogEvent):
    """A source was deleted."""


class DestinationCreated(ConnectionDefined):
    """A destination was created."""


class DestinationUpdated(ConnectionDefined):
    """A destination was changed. The event contains all of its fields, unchanged ones included."""


class DestinationReferenced(ConnectionReferenced):
    """A job reserved the destination. A destination that a job has reserved or uses cannot be deleted."""


class DestinationReferenceConfirmed(ReferenceConfirmed):
    """The job that reserved the destination exists: the reservation no longer expires."""


class DestinationReleased(ReferenceReleased):
    """A job no longer uses the destination, or its reservation expired before the job existed."""


class DestinationDeleted(CatalogEvent):
    """A destination was deleted."""
