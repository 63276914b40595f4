"""A source: where jobs read from."""

from libs.contracts import catalog
from services.catalog.domain.connection import EventTypes, connection_aggregate

SOURCE = connection_aggregate(
    EventTypes(
        role="source",
        collection="sources",
        created=catalog.SourceCreated,
        updated=catalog.SourceUpdated,
        referenced=catalog.SourceReferenced,
        confirmed=catalog.SourceReferenceConfirmed,
        released=catalog.SourceReleased,
        deleted=catalog.SourceDeleted,
    )
)
