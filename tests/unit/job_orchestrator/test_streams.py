"""The catalog of a job: what it may look like, and which streams a change makes start afresh."""

from typing import Any

import pytest

from libs.contracts.streams import StreamsConfig, difference
from libs.core.errors import InvalidInput, TooLarge
from services.job_orchestrator.domain.streams import (
    advanced_settings_text,
    catalog_of,
    object_text,
    refuse_beyond,
    supported_catalog_text,
    takes_over,
)


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
    assert catalog_of(text, "streams_config")[0] == text
    assert catalog_of({"streams": []}, "streams_config")[0] == '{"streams":[]}'


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
        ({"selected_streams": {"public": [{}]}}, "streams_config.selected_streams.public[0].stream_name"),
        ({"streams": {}}, "streams_config.streams"),
        ({"streams": [{"name": "a"}]}, "streams_config.streams[0].stream"),
        ({"streams": [{"stream": {"name": "a", "namespace": ["b"]}}]}, "streams_config.streams[0].stream.namespace"),
        ({"streams": [{"stream": {"name": "a", "sync_mode": "magic"}}]}, "streams_config.streams[0].stream.sync_mode"),
    ],
)
def test_another_shape_is_refused_by_path(value: Any, field: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        catalog_of(value, "streams_config")
    assert not field or refusal.value.errors[0].field == field


USERS = {
    "name": "users",
    "namespace": "public",
    "sync_mode": "full_refresh",
    "cursor_field": "id",
    "destination_database": "demo:public",
    "destination_table": "users",
    "type_schema": {"properties": {"id": {"destination_column_name": "id"}, "mail": {}}},
    "default_stream_properties": {"normalization": True, "append_mode": True},
    "a field of tomorrow": {"x": 1},
}
DEFAULTS = {
    "stream_name": "users",
    "partition_regex": "",
    "normalization": True,
    "append_mode": False,
    "disabled": False,
    "filter": "",
    "filter_config": {"logical_operator": "and", "conditions": []},
    "selected_columns": {"columns": ["id", "mail"], "sync_new_columns": True},
    "value_policies": {"mail": "null"},
}
FILTER = {"logical_operator": "and", "conditions": [{"column": "id", "operator": ">", "value": 1}]}
IN_PUBLIC = "streams_config.selected_streams.public[0]"


def choosing(selected: dict[str, Any], *more: dict[str, Any], **stream: Any) -> dict[str, Any]:
    """The streams ``users`` and ``more``, of which ``users`` is chosen with its defaults and changes to them."""
    return {
        "selected_streams": {"public": [DEFAULTS | selected]},
        "streams": [{"stream": USERS | stream}, *({"stream": item} for item in more)],
    }


@pytest.mark.parametrize(
    "config",
    [
        choosing({}),
        choosing({"append_mode": None, "normalization": None, "filter": None, "selected_columns": None}),
        choosing({"disabled": True, "filter": "id > 1"}) | {"streams": [], "selected_streams": {}},
        choosing({}, {"name": "other", "namespace": "public", "sync_mode": "cdc"}),
        {"selected_streams": {"public": [{"stream_name": "orders"}]}, "streams": []},
        choosing({}) | {"streams_config": choosing({})},
        choosing({"filter_config": FILTER, "append_mode": True}, sync_mode="incremental"),
        choosing(
            {"deletes": {"mode": "soft", "schedule": "every run"}, "primary_key": ["id"], "lag_seconds": 1.5},
            sync_mode="incremental",
            cursor_field="id:mail",
            source_defined_primary_key=[],
        ),
        choosing({}, type_schema={"properties": {"id": {"destination_column_name": "x"}, "mail": {}}}),
        {},
    ],
)
def test_what_front_ends_send_by_default_passes(config: dict[str, Any]) -> None:
    assert supported_catalog_text(config)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (choosing({"normalization": False}), f"{IN_PUBLIC}.normalization"),
        (choosing({"filter": "id >"}), f"{IN_PUBLIC}.filter"),
        (choosing({"filter": "nope > 1"}), f"{IN_PUBLIC}.filter"),
        (choosing({"filter": "id > 1", "filter_config": FILTER}), f"{IN_PUBLIC}.filter"),
        (
            choosing({"filter_config": {"conditions": [{"column": "id"}]}}),
            f"{IN_PUBLIC}.filter_config.conditions[0].operator",
        ),
        (
            choosing({"filter_config": {"conditions": [{"column": "x", "operator": "=", "value": 1}]}}),
            f"{IN_PUBLIC}.filter_config.conditions[0].column",
        ),
        (choosing({"primary_key": ["x"]}), f"{IN_PUBLIC}.primary_key[0]"),
        (choosing({"deletes": {"mode": "hard"}}), "streams_config.streams[0].stream.sync_mode"),
        (choosing({"deletes": {"mode": "sometimes"}}), f"{IN_PUBLIC}.deletes.mode"),
        (
            choosing({"deletes": {"mode": "hard", "schedule": "now and then"}}, sync_mode="incremental"),
            f"{IN_PUBLIC}.deletes.schedule",
        ),
        (choosing({"deletes": {"mode": "hard"}, "append_mode": True}), f"{IN_PUBLIC}.deletes"),
        (
            choosing({}, sync_mode="incremental", cursor_field="x"),
            "streams_config.streams[0].stream.cursor_field",
        ),
        (
            choosing({}, sync_mode="incremental", available_cursor_fields=["mail"]),
            "streams_config.streams[0].stream.cursor_field",
        ),
        (
            choosing({}, sync_mode="incremental", source_defined_primary_key=[]),
            "streams_config.streams[0].stream.sync_mode",
        ),
        (
            choosing({"lag_seconds": 5}, sync_mode="incremental", cursor_field=""),
            "streams_config.streams[0].stream.cursor_field",
        ),
        (
            choosing({"append_mode": True, "null_cursors": "always"}, sync_mode="incremental"),
            "streams_config.streams[0].stream.sync_mode",
        ),
        (choosing({"filter_config": "id > 1"}), f"{IN_PUBLIC}.filter_config"),
        (choosing({"chunk_column": "id"}), f"{IN_PUBLIC}.chunk_column"),
        (choosing({"split_column": "id"}), f"{IN_PUBLIC}.split_column"),
        (choosing({"selected_columns": {"columns": ["id", "x"]}}), f"{IN_PUBLIC}.selected_columns.columns[1]"),
        (choosing({"selected_columns": {"columns": "id"}}), f"{IN_PUBLIC}.selected_columns.columns"),
        (choosing({"value_policies": {"mail": "drop"}}), f"{IN_PUBLIC}.value_policies.mail"),
        (choosing({"value_policies": {"x": "null"}}), f"{IN_PUBLIC}.value_policies.x"),
        (choosing({"selected_columns": {"columns": ["id"]}}), f"{IN_PUBLIC}.value_policies.mail"),
        (choosing({"stream_name": "nope"}), f"{IN_PUBLIC}.stream_name"),
        (choosing({"disabled": True}), "streams_config.selected_streams"),
        (choosing({}, USERS), "streams_config.streams[1].stream.name"),
        (choosing({}, sync_mode="cdc"), "streams_config.streams[0].stream.sync_mode"),
        (
            choosing({}, type_schema={"properties": {"id": {"destination_column_name": "mail"}, "mail": {}}}),
            "streams_config.streams[0].stream.type_schema.properties.mail.destination_column_name",
        ),
        (choosing({}, type_schema={"properties": ["id"]}), "streams_config.streams[0].stream.type_schema.properties"),
        (
            {"streams": [{"stream": USERS}, {"stream": USERS | {"name": "people"}}]},
            "streams_config.streams[1].stream.destination_table",
        ),
        (
            {"selected_streams": {"public": [{"stream_name": "a"}, {"stream_name": "a"}]}},
            "streams_config.selected_streams.public[1].stream_name",
        ),
        (
            {"selected_streams": {"public": [{"stream_name": "a", "chunk_column": "id"}]}},
            "streams_config.selected_streams.public[0].chunk_column",
        ),
    ],
)
def test_what_a_run_can_not_honour_is_refused_by_path(config: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        supported_catalog_text(config)
    assert field in [error.field for error in refusal.value.errors]
    assert field in refusal.value.message


@pytest.mark.parametrize(
    ("config", "field", "near"),
    [
        (
            {"selected_stream": {"public": [{"stream_name": "users"}]}},
            "streams_config.selected_stream",
            "selected_streams",
        ),
        (choosing({"columns": ["id"]}), f"{IN_PUBLIC}.columns", "selected_columns"),
        (choosing({"select_columns": {"columns": ["id"]}}), f"{IN_PUBLIC}.select_columns", "selected_columns"),
        (choosing({"selected_columns": {"column": ["id"]}}), f"{IN_PUBLIC}.selected_columns.column", "columns"),
        (choosing({"filter_config": {"condition": [1]}}), f"{IN_PUBLIC}.filter_config.condition", "conditions"),
        (choosing({"a field of tomorrow": 1}), f"{IN_PUBLIC}.a field of tomorrow", None),
    ],
)
def test_an_unknown_field_of_the_choice_is_refused_with_a_similar_one(
    config: dict[str, Any], field: str, near: str | None
) -> None:
    with pytest.raises(InvalidInput) as refusal:
        supported_catalog_text(config)
    (error,) = refusal.value.errors
    assert (error.field, error.code) == (field, "unknown_field")
    assert (f"did you mean {near}?" in error.message) if near else ("did you mean" not in error.message)


def test_an_unknown_advanced_setting_is_refused_with_a_similar_one() -> None:
    with pytest.raises(InvalidInput) as refusal:
        advanced_settings_text({"verfy": True})
    assert refusal.value.message == "advanced_settings.verfy: is not a known field; did you mean verify?"


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"verify": "yes"}, "advanced_settings.verify"),
        ({"verify": 1}, "advanced_settings.verify"),
        ({"take_over": "true"}, "advanced_settings.take_over"),
        ({"max_discover_threads": 0}, "advanced_settings.max_discover_threads"),
        ({"max_discover_threads": True}, "advanced_settings.max_discover_threads"),
        ({"max_discover_threads": "5"}, "advanced_settings.max_discover_threads"),
    ],
)
def test_advanced_settings_of_another_type_are_refused_by_path(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        advanced_settings_text(settings)
    assert [error.field for error in refusal.value.errors] == [field]


def test_advanced_settings_are_kept_as_they_came() -> None:
    assert advanced_settings_text(None) == advanced_settings_text("") == "null"
    text = '{"max_discover_threads": null,  "verify": null}'
    assert advanced_settings_text(text) == text


def test_tables_are_taken_over_only_when_asked_for() -> None:
    assert takes_over('{"take_over": true}')
    assert not any(takes_over(text) for text in ("null", "{}", '{"take_over": false}', '{"take_over": "true"}'))


def test_a_catalog_that_no_event_can_hold_is_too_large() -> None:
    with pytest.raises(TooLarge):
        object_text({"streams": ["x" * 900_000]}, "streams_config")


def cleared(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The difference of two catalogs as it is answered."""
    found = difference(StreamsConfig.model_validate(before), StreamsConfig.model_validate(after))
    return found.model_dump(exclude_unset=True)


def test_a_stream_whose_mode_changes_is_cleared_as_it_was_defined_before() -> None:
    before = catalog(flights={"sync_mode": "full_refresh"}, planes={"sync_mode": "full_refresh"})
    after = catalog(flights={"sync_mode": "incremental"}, planes={"sync_mode": "full_refresh"})
    found = cleared(before, after)
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
    assert cleared(catalog(a={}), catalog(a=setting))["selected_streams"] == {"public": [{"stream_name": "a"}]}


def test_streams_that_come_go_or_stay_are_not_cleared() -> None:
    assert cleared(catalog(a={}, gone={}), catalog(a={"chosen": {"filter": "", "append_mode": False}}, new={})) == {
        "selected_streams": {},
        "streams": [],
    }


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (choosing({"partition_regex": "/{id}"}), f"{IN_PUBLIC}.partition_regex"),
        (choosing({}), None),
        (choosing({"append_mode": True, "filter": "id > 1"}, sync_mode="incremental"), None),
    ],
)
def test_what_an_end_can_not_do_is_refused_by_path(config: dict[str, Any], field: str | None) -> None:
    text = supported_catalog_text(config)
    if field is None:
        refuse_beyond(text, "postgres", "parquet")
        return
    with pytest.raises(InvalidInput) as refusal:
        refuse_beyond(text, "postgres", "parquet")
    assert [error.field for error in refusal.value.errors] == [field]
