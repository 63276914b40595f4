"""From the saved catalog to the plans of a run."""

import json
from typing import Any

import pytest

from libs.connectors.protocol import ConnectorRefused, StreamPlan, Target
from services.worker.selection import parse_advanced_settings, parse_streams_config, plans_of

USERS = {"stream": {"name": "users", "namespace": "public", "type_schema": {"properties": {"id": {}, "mail": {}}}}}
ORDERS = {"stream": {"name": "orders", "namespace": "sales"}}


def plans(selected: Any, *entries: dict[str, Any]) -> list[StreamPlan]:
    config = parse_streams_config(json.dumps({"selected_streams": selected, "streams": entries or (USERS, ORDERS)}))
    return plans_of(config, config.streams or [])


def test_without_a_selection_every_stream_moves() -> None:
    empty: tuple[Any, ...] = ({}, None, {"public": []})
    for nothing in empty:
        assert [str(plan.stream) for plan in plans(nothing)] == ["public.users", "sales.orders"]


def test_only_the_selected_move_in_the_catalogs_order() -> None:
    selected = {"sales": [{"stream_name": "orders"}], "public": [{"stream_name": "users", "disabled": True}]}
    assert [str(plan.stream) for plan in plans(selected)] == ["sales.orders"]


def test_the_target_follows_the_catalog() -> None:
    stream = ORDERS["stream"] | {"destination_database": "demo:sales", "destination_table": "bought"}
    assert plans({}, {"stream": stream})[0].target == Target("demo_sales", "bought")
    assert plans({}, ORDERS)[0].target == Target("sales", "orders")


def test_columns_are_chosen_or_left_out() -> None:
    def chosen(**fields: Any) -> StreamPlan:
        return plans({"public": [{"stream_name": "users", "selected_columns": fields}]})[0]

    assert chosen(columns=["id"]).columns == ("id",)
    assert chosen(columns=[]).columns is None
    new_too = chosen(columns=["id"], sync_new_columns=True)
    assert (new_too.columns, new_too.left_out) == (None, frozenset({"mail"}))


@pytest.mark.parametrize(
    ("entry", "selected", "words"),
    [
        (USERS["stream"] | {"sync_mode": "incremental"}, {}, "the sync mode incremental"),
        (USERS["stream"], {"filter": "id > 1"}, "a filter"),
        (USERS["stream"], {"filter_config": {"conditions": [{"column": "id"}]}}, "a filter"),
        (USERS["stream"], {"partition_regex": "/{id}"}, "partitioning"),
        (
            USERS["stream"] | {"type_schema": {"properties": {"id": {"destination_column_name": "x"}}}},
            {},
            "another name for a column",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(entry: dict[str, Any], selected: dict[str, Any], words: str) -> None:
    with pytest.raises(ConnectorRefused, match=f"public.users asks for {words}"):
        plans({"public": [{"stream_name": "users"} | selected]}, {"stream": entry})


def test_two_streams_may_not_share_a_table() -> None:
    other = {"name": "users", "namespace": "old", "destination_database": "public"}
    with pytest.raises(ConnectorRefused, match=r"public\.users and old\.users both go to public\.users"):
        plans({}, USERS, {"stream": other})


@pytest.mark.parametrize(("text", "verify"), [("", False), ("null", False), ("{}", False), ('{"verify": true}', True)])
def test_advanced_settings_may_be_absent(text: str, verify: bool) -> None:
    assert parse_advanced_settings(text).verify is verify
