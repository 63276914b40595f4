"""The catalog of a job: what it may look like, and which streams a change makes start afresh."""

from typing import Any

import pytest

from libs.core.errors import InvalidInput, TooLarge
from services.job_orchestrator.domain.streams import catalog_text, difference, object_text


def catalog(**streams: dict[str, Any]) -> dict[str, Any]:
    """A catalog in which every given stream is chosen; ``chosen`` holds the settings of the choice."""
    selected = [{"stream_name": name, **given.get("chosen", {})} for name, given in streams.items()]
    defined = [
        {"stream": {"name": name, "namespace": "public", **{k: v for k, v in given.items() if k != "chosen"}}}
        for name, given in streams.items()
    ]
    return {"selected_streams": {"public": selected}, "streams": defined}


def test_a_catalog_is_kept_as_it_came() -> None:
    text = '{"selected_streams": {},  "streams": [], "x": 1.50}'
    assert catalog_text(text) == text
    assert catalog_text({"streams": []}) == '{"streams":[]}'


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (None, "streams_config"),
        (5, "streams_config"),
        ([], "streams_config"),
        ("[]", "streams_config"),
        ("", ""),
        ("{", ""),
        ('{"a": 1, "a": 2}', "a"),
        ({"selected_streams": []}, "streams_config.selected_streams"),
        ({"selected_streams": {"public": {}}}, "streams_config.selected_streams.public"),
        ({"selected_streams": {"public": [{}]}}, "streams_config.selected_streams.public[0]"),
        ({"streams": {}}, "streams_config.streams"),
        ({"streams": [{"name": "a"}]}, "streams_config.streams[0]"),
        ({"streams": [{"stream": {"name": "a", "sync_mode": "magic"}}]}, "streams_config.streams[0].stream.sync_mode"),
    ],
)
def test_another_shape_is_refused_by_path(value: Any, field: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        catalog_text(value)
    assert not field or refusal.value.errors[0].field == field


def test_a_catalog_that_no_event_can_hold_is_too_large() -> None:
    with pytest.raises(TooLarge):
        object_text({"streams": ["x" * 900_000]}, "streams_config")


def test_a_stream_whose_mode_changes_is_cleared_as_it_was_defined_before() -> None:
    before = catalog(flights={"sync_mode": "full_refresh"}, planes={"sync_mode": "full_refresh"})
    after = catalog(flights={"sync_mode": "incremental"}, planes={"sync_mode": "full_refresh"})
    found = difference(before, after)
    assert found["selected_streams"] == {"public": [{"stream_name": "flights"}]}
    assert found["streams"] == [{"stream": {"name": "flights", "namespace": "public", "sync_mode": "full_refresh"}}]


@pytest.mark.parametrize(
    "setting",
    [
        {"chosen": {"append_mode": True}},
        {"chosen": {"normalization": True}},
        {"chosen": {"partition_regex": "/{a}"}},
        {"chosen": {"filter": "a > 1"}},
        {"cursor_field": "updated_at"},
        {"destination_database": "x:public"},
        {"destination_table": "other"},
    ],
)
def test_each_setting_that_shapes_the_data_counts(setting: dict[str, Any]) -> None:
    assert difference(catalog(a={}), catalog(a=setting))["selected_streams"] == {"public": [{"stream_name": "a"}]}


def test_streams_that_come_go_or_stay_are_not_cleared() -> None:
    assert difference(catalog(a={}, gone={}), catalog(a={"chosen": {"filter": "", "append_mode": False}}, new={})) == {}
