"""What sources and destinations decide; both are of one shape, so each case runs on both."""

from datetime import timedelta
from typing import Any

import pytest

from libs.contracts import catalog
from libs.core.decider import Aggregate
from libs.core.errors import Conflict, InvalidInput, NotFound
from libs.testing.given import MOMENT, given
from services.catalog.domain.connection import (
    Confirm,
    Connection,
    Create,
    Definition,
    Delete,
    Expire,
    Release,
    Reserve,
    Update,
)
from services.catalog.domain.destination import DESTINATION
from services.catalog.domain.source import SOURCE

UNTIL = MOMENT + timedelta(seconds=30)
LATER = MOMENT + timedelta(seconds=1)
BEFORE = MOMENT - timedelta(seconds=1)
FLIGHTS = Definition(name="flights", type="postgres", version="v1.0.0", config_json="{}", secret_ref="r1")
RENAMED = FLIGHTS.model_copy(update={"name": "planes"})

Words = tuple[Aggregate[Connection], dict[str, Any]]
SOURCE_WORDS = {
    "created": catalog.SourceCreated,
    "updated": catalog.SourceUpdated,
    "referenced": catalog.SourceReferenced,
    "confirmed": catalog.SourceReferenceConfirmed,
    "released": catalog.SourceReleased,
    "deleted": catalog.SourceDeleted,
}
DESTINATION_WORDS = {
    "created": catalog.DestinationCreated,
    "updated": catalog.DestinationUpdated,
    "referenced": catalog.DestinationReferenced,
    "confirmed": catalog.DestinationReferenceConfirmed,
    "released": catalog.DestinationReleased,
    "deleted": catalog.DestinationDeleted,
}


class Spoken:
    """The events of one kind of connection, made short."""

    def __init__(self, aggregate: Aggregate[Connection], words: dict[str, Any]) -> None:
        self.aggregate = aggregate
        self.created = words["created"](**FLIGHTS.model_dump())
        self.renamed = words["updated"](**RENAMED.model_dump())
        self.deleted = words["deleted"]()
        self._words = words

    def referenced(self, job_id: int = 1, name: str = "nightly", until: Any = UNTIL) -> Any:
        return self._words["referenced"](job_id=job_id, job_name=name, reserved_until=until)

    def confirmed(self, job_id: int = 1) -> Any:
        return self._words["confirmed"](job_id=job_id)

    def released(self, job_id: int = 1) -> Any:
        return self._words["released"](job_id=job_id)


@pytest.fixture(params=[(SOURCE, SOURCE_WORDS), (DESTINATION, DESTINATION_WORDS)], ids=["source", "destination"])
def said(request: pytest.FixtureRequest) -> Spoken:
    return Spoken(*request.param)


def test_a_created_one_remembers_who_when_and_where(said: Spoken) -> None:
    state = given(said.aggregate).when(Create(FLIGHTS)).state
    assert (state.definition, state.project_id, state.created_by, state.created_at) == (FLIGHTS, 123, "ada", MOMENT)
    assert said.aggregate.unique_keys(state) == ("123/flights",)


def test_what_exists_is_not_created_again(said: Spoken) -> None:
    given(said.aggregate, said.created).when(Create(FLIGHTS)).then_refused(Conflict)


def test_a_change_is_told_and_no_change_is_not(said: Spoken) -> None:
    here = given(said.aggregate, said.created)
    after = here.when(Update(RENAMED, "r1")).then(said.renamed)
    assert after.state is not None
    assert said.aggregate.unique_keys(after.state) == ("123/planes",)
    here.when(Update(FLIGHTS, "r1")).then()


@pytest.mark.parametrize("command", [Update(RENAMED, "r0"), Update(RENAMED, None), Delete("r0")])
def test_what_was_prepared_on_other_secrets_is_refused(said: Spoken, command: Any) -> None:
    given(said.aggregate, said.created).when(command).then_refused(Conflict, code="secrets_changed")


def test_the_type_does_not_change(said: Spoken) -> None:
    other = FLIGHTS.model_copy(update={"type": "mysql"})
    refusal = (
        given(said.aggregate, said.created).when(Update(other, "r1")).then_refused(InvalidInput, code="type_changed")
    )
    assert refusal.errors[0].field == "type"


@pytest.mark.parametrize(
    "command", [Update(RENAMED, "r1"), Delete("r1"), Reserve(1, "nightly", UNTIL), Release(1, LATER)]
)
def test_what_is_not_there_or_deleted_is_not_found(said: Spoken, command: Any) -> None:
    given(said.aggregate).when(command).then_refused(NotFound)
    given(said.aggregate, said.created, said.deleted).when(command).then_refused(NotFound)


def test_a_deleted_one_frees_its_name(said: Spoken) -> None:
    after = given(said.aggregate, said.created).when(Delete("r1")).then(said.deleted)
    assert after.state is not None
    assert said.aggregate.unique_keys(after.state) == ()


def test_what_a_job_holds_is_not_deleted_and_the_jobs_are_named(said: Spoken) -> None:
    held = [said.referenced(job_id, f"job {job_id}") for job_id in range(1, 8)]
    refusal = given(said.aggregate, said.created, *held).when(Delete("r1")).then_refused(Conflict, code="in_use")
    assert '"job 1"' in refusal.message
    assert "2 more" in refusal.message


def test_a_released_one_can_be_deleted(said: Spoken) -> None:
    happened = (said.created, said.referenced(), said.confirmed(), said.released())
    given(said.aggregate, *happened).when(Delete("r1")).then(said.deleted)


def test_a_reservation_is_made_once_and_renewed_when_it_is_to_last_longer(said: Spoken) -> None:
    reserve = Reserve(1, "nightly", UNTIL)
    after = given(said.aggregate, said.created).when(reserve).then(said.referenced())
    after.when(reserve).then()
    longer = UNTIL + timedelta(seconds=9)
    after.when(Reserve(1, "nightly", longer)).then(said.referenced(until=longer))


def test_being_held_does_not_count_as_an_update(said: Spoken) -> None:
    after = given(said.aggregate, said.created).when(Reserve(1, "nightly", UNTIL)).state
    assert (after.updated_at, after.updated_by) == (MOMENT, "ada")


def test_an_existing_job_confirms_its_hold_once(said: Spoken) -> None:
    reserved = given(said.aggregate, said.created, said.referenced())
    reserved.when(Confirm(1, "nightly", LATER)).then(said.confirmed()).when(Confirm(1, "nightly", LATER)).then()


def test_a_job_that_is_not_known_to_hold_it_is_noted_when_it_does(said: Spoken) -> None:
    here = given(said.aggregate, said.created)
    here.when(Confirm(1, "nightly", LATER)).then(said.referenced(until=LATER), said.confirmed())


def test_a_renamed_job_holds_it_under_its_new_name(said: Spoken) -> None:
    here = given(said.aggregate, said.created, said.referenced(), said.confirmed())
    renamed = here.when(Confirm(1, "hourly", LATER)).then(said.referenced(name="hourly", until=LATER), said.confirmed())
    assert '"hourly"' in renamed.when(Delete("r1")).then_refused(Conflict).message


def test_an_older_change_of_the_job_does_not_undo_a_younger_reservation(said: Spoken) -> None:
    """The job moved away, and wants it back before the news of the first move has arrived."""
    again = given(said.aggregate, said.created, said.referenced(), said.confirmed(), said.referenced())
    again.when(Release(1, BEFORE)).then()
    again.when(Confirm(1, "nightly", BEFORE)).then()
    again.when(Confirm(1, "nightly", LATER)).then(said.confirmed())


def test_a_confirmed_hold_is_reserved_anew(said: Spoken) -> None:
    confirmed = given(said.aggregate, said.created, said.referenced(), said.confirmed())
    confirmed.when(Reserve(1, "nightly", UNTIL)).then(said.referenced())


def test_only_the_reservation_that_ended_expires(said: Spoken) -> None:
    reserved = given(said.aggregate, said.created, said.referenced())
    reserved.when(Expire(1, UNTIL)).then(said.released())
    reserved.when(Expire(1, LATER)).then()
    given(said.aggregate, said.created, said.referenced(), said.confirmed()).when(Expire(1, UNTIL)).then()
    given(said.aggregate, said.created).when(Expire(1, UNTIL)).then()


def test_a_job_that_never_held_it_has_nothing_to_release(said: Spoken) -> None:
    given(said.aggregate, said.created, said.referenced(2)).when(Release(1, LATER)).then()
