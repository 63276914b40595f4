"""What job events come to here: holds on both ends, and the documents that show jobs."""

from typing import Any

from libs.contracts import jobs
from libs.core.envelope import Event
from libs.testing.given import MOMENT, envelope
from services.catalog.domain.connection import Confirm, Release
from services.catalog.projections import apply
from services.catalog.reactions import react

FIELDS: dict[str, Any] = {
    "name": "nightly",
    "source_id": 4,
    "destination_id": 5,
    "frequency": "",
    "streams_config_json": "{}",
    "advanced_settings_json": "null",
    "activate": True,
}
CREATED = jobs.JobCreated(**FIELDS)
CONFIRM = Confirm(7, "nightly", MOMENT)
RELEASE = Release(7, MOMENT)


def reacted(event: Event) -> list[tuple[str, int | str, Any]]:
    acts = react(envelope(event, stream="job-7"))
    assert all(act.ignore_refusal for act in acts)
    return [(act.aggregate.name, act.entity_id, act.command) for act in acts]


def projected(*events: Event) -> dict[str, Any] | None:
    document: dict[str, Any] | None = None
    for event in events:
        document = apply(document, envelope(event, stream="job-7"))
    return document


def test_a_new_job_confirms_both_ends() -> None:
    assert reacted(CREATED) == [("source", 4, CONFIRM), ("destination", 5, CONFIRM)]


def test_a_job_that_moved_confirms_the_new_end_and_releases_the_old_one() -> None:
    assert reacted(jobs.JobUpdated(**FIELDS, previous_source_id=3)) == [
        ("source", 4, CONFIRM),
        ("destination", 5, CONFIRM),
        ("source", 3, RELEASE),
    ]


def test_a_deleted_job_releases_both_ends() -> None:
    assert reacted(jobs.JobDeleted(source_id=4, destination_id=5)) == [
        ("source", 4, RELEASE),
        ("destination", 5, RELEASE),
    ]


def test_other_events_of_a_job_change_no_hold() -> None:
    assert reacted(jobs.JobActivated()) == []


def test_a_jobs_document_follows_it_to_its_end() -> None:
    requested = jobs.JobRunRequested(run_id="r", kind="sync", trigger="manual")
    ended = jobs.JobRunEnded(run_id="r", outcome="completed")
    document = projected(CREATED, jobs.JobDeactivated(), requested)
    assert document is not None
    assert (document["project_id"], document["name"], document["activate"]) == (123, "nightly", False)
    assert (document["last_run_state"], document["last_run_time"]) == ("running", MOMENT)
    finished = projected(CREATED, requested, ended, jobs.JobUpdated(**FIELDS | {"name": "hourly"}))
    assert finished is not None
    assert (finished["name"], finished["last_run_state"]) == ("hourly", "completed")
    assert projected(CREATED, jobs.JobDeleted()) is None
    assert projected(jobs.JobActivated()) is None
