"""A destination: where jobs write to."""

from libs.contracts import catalog
from services.catalog.domain.connection import EventTypes, connection_aggregate

DESTINATION = connection_aggregate(
    EventTypes(
        role="destination",
        collection="destinations",
        created=catalog.DestinationCreated,
        updated=catalog.DestinationUpdated,
        referenced=catalog.DestinationReferenced,
        confirmed=catalog.DestinationReferenceConfirmed,
        released=catalog.DestinationReleased,
        deleted=catalog.DestinationDeleted,
    )
)
