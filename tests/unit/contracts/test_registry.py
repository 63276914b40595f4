"""An event registers itself under the type that its name gives."""

import pytest

from libs.contracts import registry
from libs.contracts.auth import ApiKeyIssued, OauthClientIssued
from libs.contracts.jobs import JobRunEnded
from libs.testing.things import TOPIC, ThingEvent, ThingMade


def test_an_event_has_the_type_of_its_name_and_the_topic_of_its_parent() -> None:
    assert [event.TYPE for event in (ApiKeyIssued, OauthClientIssued, JobRunEnded, ThingMade)] == [
        "api_key_issued",
        "oauth_client_issued",
        "job_run_ended",
        "thing_made",
    ]
    assert ThingMade.TOPIC == TOPIC
    assert ThingMade in registry.registered_events()


def test_a_class_that_only_gives_events_their_fields_is_not_registered() -> None:
    class ThingPolished(ThingEvent, registered=False):
        pass

    assert not registry.is_known("thing_polished", 1)
    assert ThingPolished not in registry.registered_events()
    assert ThingEvent not in registry.registered_events()


def test_a_second_event_of_the_same_type_is_refused() -> None:
    with pytest.raises(ValueError, match="thing_made"):
        type("ThingMade", (ThingEvent,), {})
