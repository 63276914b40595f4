"""A developer sync record: data about one external resource of one developer, written by the developer's tools.

``developer_id``, ``resource_type`` and ``resource_key`` together name it: only one living record of a project has them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import product
from typing import assert_never

from libs.contracts.records import RecordCreated, RecordDeleted, RecordUpdated
from libs.core.decider import Aggregate, Listing
from libs.core.envelope import Envelope, Event, Frozen
from libs.core.errors import Conflict, NotFound
from libs.core.json import dump_json

ACTIVE = "ACTIVE"


class Record(Frozen):
    """A record as it stands.

    Args:
        data_json, metadata_json: JSON objects as text, never parsed here: their numbers stay as they were sent.
        last_synced_at: the time of the last write that left the status ``ACTIVE``, None before the first.
    """

    project_id: int
    developer_id: str
    resource_type: str
    resource_key: str
    data_json: str
    status: str
    metadata_json: str
    last_synced_at: datetime | None
    created_at: datetime
    updated_at: datetime
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class CreateRecord:
    developer_id: str
    resource_type: str
    resource_key: str
    data_json: str
    status: str
    metadata_json: str


@dataclass(frozen=True, slots=True)
class UpdateRecord:
    """None leaves a field unchanged; a command of only None has no effect. Equal values count as a write."""

    data_json: str | None = None
    status: str | None = None
    metadata_json: str | None = None

    @property
    def is_empty(self) -> bool:
        return self.data_json is None and self.status is None and self.metadata_json is None


@dataclass(frozen=True, slots=True)
class DeleteRecord:
    pass


Command = CreateRecord | UpdateRecord | DeleteRecord


def decide(state: Record | None, command: Command) -> Sequence[Event]:
    match command:
        case CreateRecord():
            if state is not None:
                raise Conflict("the record exists already", code="already_exists")
            return [
                RecordCreated(
                    developer_id=command.developer_id,
                    resource_type=command.resource_type,
                    resource_key=command.resource_key,
                    data_json=command.data_json,
                    status=command.status,
                    metadata_json=command.metadata_json,
                )
            ]
        case UpdateRecord():
            living = _living(state)
            if command.is_empty:
                return []
            return [
                RecordUpdated(
                    developer_id=living.developer_id,
                    resource_type=living.resource_type,
                    resource_key=living.resource_key,
                    data_json=command.data_json,
                    status=command.status,
                    metadata_json=command.metadata_json,
                )
            ]
        case DeleteRecord():
            living = _living(state)
            return [
                RecordDeleted(
                    developer_id=living.developer_id,
                    resource_type=living.resource_type,
                    resource_key=living.resource_key,
                )
            ]
        case _:
            assert_never(command)


def evolve(state: Record | None, envelope: Envelope) -> Record:
    now = envelope.time
    match envelope.data:
        case RecordCreated() as created:
            return Record(
                project_id=envelope.metadata.project_id or 0,
                developer_id=created.developer_id,
                resource_type=created.resource_type,
                resource_key=created.resource_key,
                data_json=created.data_json,
                status=created.status,
                metadata_json=created.metadata_json,
                last_synced_at=now if created.status == ACTIVE else None,
                created_at=now,
                updated_at=now,
            )
        case RecordUpdated() as updated:
            assert state is not None, "a record's stream begins with its creation"
            written = {name: text for name in _WRITABLE if (text := getattr(updated, name)) is not None}
            is_synced = written.get("status", state.status) == ACTIVE
            last_synced_at = now if is_synced else state.last_synced_at
            return state.model_copy(update={**written, "updated_at": now, "last_synced_at": last_synced_at})
        case RecordDeleted():
            assert state is not None, "a record's stream begins with its creation"
            return state.model_copy(update={"deleted": True, "updated_at": now})
        case unknown:
            raise AssertionError(f"a record has no event {unknown.TYPE}")


_WRITABLE = ("data_json", "status", "metadata_json")


def unique_keys(state: Record) -> Sequence[str]:
    if state.deleted:
        return ()
    return (dump_json([state.project_id, state.developer_id, state.resource_type, state.resource_key]),)


def list_name(project_id: int, developer_id: str | None, resource_type: str | None, status: str | None) -> str:
    """The name of the list of a project's records with these values; None matches any."""
    return dump_json([project_id, developer_id, resource_type, status])


def lists(state: Record) -> Sequence[str]:
    """Every list of the API that contains a record: each filter is unset, or set to the record's value."""
    if state.deleted:
        return ()
    choices = product((None, state.developer_id), (None, state.resource_type), (None, state.status))
    return [list_name(state.project_id, *choice) for choice in choices]


def _living(state: Record | None) -> Record:
    if state is None or state.deleted:
        raise NotFound("the record does not exist", code="record_not_found")
    return state


RECORD: Aggregate[Record] = Aggregate(
    name="record",
    collection="records",
    state=Record,
    decide=decide,
    evolve=evolve,
    unique_keys=unique_keys,
    conflict_message="a record with this developerId, resourceType and resourceKey exists already",
    conflict_field="resourceKey",
    listing=Listing("record_lists", lists),
)
