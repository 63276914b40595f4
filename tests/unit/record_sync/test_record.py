"""What a developer sync record decides."""

from datetime import timedelta

from libs.contracts.records import RecordCreated, RecordDeleted, RecordUpdated
from libs.core.errors import Conflict, NotFound
from libs.testing.given import MOMENT, envelope, given
from services.record_sync.domain.record import (
    RECORD,
    CreateRecord,
    DeleteRecord,
    UpdateRecord,
    evolve,
    list_name,
    lists,
    unique_keys,
)

NAMED = {"developer_id": "dev-1", "resource_type": "FLAG", "resource_key": "k"}
CREATE = CreateRecord(**NAMED, data_json="{}", status="ACTIVE", metadata_json="{}")
CREATED = RecordCreated(**NAMED, data_json="{}", status="ACTIVE", metadata_json="{}")
PENDING = CREATED.model_copy(update={"status": "PENDING"})
DELETED = RecordDeleted(**NAMED)


def test_a_record_is_made_once() -> None:
    given(RECORD).when(CREATE).then(CREATED)
    given(RECORD, CREATED).when(CREATE).then_refused(Conflict)


def test_a_write_names_only_what_was_written() -> None:
    written = given(RECORD, CREATED).when(UpdateRecord(status="ERROR"))
    written.then(RecordUpdated(**NAMED, status="ERROR"))
    assert written.state.data_json == "{}"
    given(RECORD, CREATED).when(UpdateRecord()).then()


def test_the_same_values_again_are_a_write_and_thus_a_synchronisation() -> None:
    given(RECORD, CREATED).when(UpdateRecord(data_json="{}")).then(RecordUpdated(**NAMED, data_json="{}"))


def test_what_was_deleted_takes_no_command() -> None:
    gone = given(RECORD, CREATED, DELETED)
    for command in (UpdateRecord(status="ERROR"), DeleteRecord()):
        gone.when(command).then_refused(NotFound, code="record_not_found")
    given(RECORD).when(DeleteRecord()).then_refused(NotFound)


def test_it_counts_as_synchronised_when_a_write_leaves_it_active() -> None:
    state = evolve(None, envelope(PENDING))
    assert state.last_synced_at is None
    later = MOMENT + timedelta(seconds=1)
    state = evolve(state, envelope(RecordUpdated(**NAMED, data_json="[]"), time=later))
    assert (state.last_synced_at, state.updated_at, state.created_at) == (None, later, MOMENT)
    state = evolve(state, envelope(RecordUpdated(**NAMED, status="ACTIVE"), time=later))
    assert state.last_synced_at == later
    last = later + timedelta(seconds=1)
    state = evolve(state, envelope(RecordUpdated(**NAMED, status="ERROR"), time=last))
    assert (state.last_synced_at, state.updated_at) == (later, last)


def test_its_key_is_free_and_its_lists_are_left_once_it_is_deleted() -> None:
    living, gone = evolve(None, envelope(CREATED)), evolve(evolve(None, envelope(CREATED)), envelope(DELETED))
    assert (len(unique_keys(living)), unique_keys(gone)) == (1, ())
    assert (len(set(lists(living))), lists(gone)) == (8, ())
    assert list_name(123, None, None, None) in lists(living)
    assert list_name(123, "dev-1", "FLAG", "ACTIVE") in lists(living)
