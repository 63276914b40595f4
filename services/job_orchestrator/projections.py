"""What this service keeps about sources and destinations, which catalog owns."""

from collections.abc import Callable
from typing import Any

from libs.contracts import catalog
from libs.core.decider import Projection
from libs.core.envelope import Envelope

_DEFINED = (
    catalog.SourceCreated,
    catalog.SourceUpdated,
    catalog.DestinationCreated,
    catalog.DestinationUpdated,
)
_DELETED = (catalog.SourceDeleted, catalog.DestinationDeleted)


def _key_of(kind: str) -> Callable[[Envelope], int | None]:
    def key(envelope: Envelope) -> int | None:
        concerned = isinstance(envelope.data, _DEFINED + _DELETED) and envelope.stream.startswith(f"{kind}-")
        return int(envelope.entity_id) if concerned else None

    return key


def apply(document: dict[str, Any] | None, envelope: Envelope) -> dict[str, Any] | None:
    """``{project_id, name, type, version, config_json, deleted}``; the configuration has its secrets masked."""
    match envelope.data:
        case catalog.ConnectionDefined() as event:
            return {
                **(document or {}),
                "project_id": envelope.metadata.project_id,
                "name": event.name,
                "type": event.type,
                "version": event.version,
                "config_json": event.config_json,
                "deleted": False,
            }
        case catalog.SourceDeleted() | catalog.DestinationDeleted():
            return None if document is None else {**document, "deleted": True}
        case _:
            return document


SOURCES = Projection(collection="sources", topic=catalog.TOPIC, key=_key_of("source"), apply=apply)
DESTINATIONS = Projection(collection="destinations", topic=catalog.TOPIC, key=_key_of("destination"), apply=apply)
