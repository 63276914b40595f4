"""How the API shows records, their events and their changes; free-form JSON is spliced in as it is kept."""

from collections.abc import Mapping
from typing import Any

import orjson

from libs.contracts.records import RecordEvent
from libs.core.clock import isoformat_z
from libs.core.envelope import Envelope
from libs.core.errors import DataSyncError
from libs.eventsourcing.command_handler import Entity
from services.record_sync.domain.record import Record

JsonObject = dict[str, Any]


def record_view(entity: Entity[Record]) -> JsonObject:
    """A record as the API shows it, all fields."""
    return stored_view(entity.id, vars(entity.state))


def stored_view(identifier: int | str, state: Mapping[str, Any]) -> JsonObject:
    """The same, of a state as it is stored: lists have no need to check every record that they read."""
    last_synced_at = state["last_synced_at"]
    return {
        "id": identifier,
        "developerId": state["developer_id"],
        "resourceType": state["resource_type"],
        "resourceKey": state["resource_key"],
        "data": orjson.Fragment(state["data_json"]),
        "lastSyncedAt": None if last_synced_at is None else isoformat_z(last_synced_at),
        "status": state["status"],
        "createdAt": isoformat_z(state["created_at"]),
        "updatedAt": isoformat_z(state["updated_at"]),
        "metadata": orjson.Fragment(state["metadata_json"]),
    }


def event_view(envelope: Envelope) -> JsonObject:
    """An event of a record's history: who did what when, and what was written."""
    data = envelope.data.model_dump(exclude_none=True)
    changes = {name: data[name] for name in ("status",) if name in data}
    for name in ("data", "metadata"):
        if f"{name}_json" in data:
            changes[name] = orjson.Fragment(data[f"{name}_json"])
    return {
        "id": envelope.id,
        "type": envelope.type,
        "version": envelope.version,
        "time": isoformat_z(envelope.time),
        "actor": envelope.metadata.actor,
        "changes": changes,
    }


def change_view(envelope: Envelope) -> JsonObject:
    """An event as the change feed tells it: with its position and what record it is about."""
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


def result_view(result: Entity[Record] | DataSyncError, status: int) -> JsonObject:
    """What became of one operation of a batch."""
    if isinstance(result, DataSyncError):
        errors = [{"field": item.field, "message": item.message, "code": item.code} for item in result.errors]
        return {"status": result.status, "error": {"code": result.code, "detail": result.message, "errors": errors}}
    if status == 204:
        return {"status": status, "id": result.id}
    return {"status": status, "id": result.id, "version": result.version, "record": record_view(result)}
