"""From the saved catalog to the plans of a run."""

import json
from typing import Any

import pytest

from libs.connectors.protocol import ConnectorRefused, StreamPlan, Target
from libs.contracts.capabilities import EVERYTHING
from libs.contracts.streams import AdvancedSettings, parse_advanced_settings, parse_streams_config
from services.worker.selection import Wanted, wanted_streams

USERS = {"stream": {"name": "users", "namespace": "public", "type_schema": {"properties": {"id": {}, "mail": {}}}}}
ORDERS = {"stream": {"name": "orders", "namespace": "sales"}}


def wanted(selected: Any, *entries: dict[str, Any]) -> list[Wanted]:
    config = parse_streams_config(json.dumps({"selected_streams": selected, "streams": entries or (USERS, ORDERS)}))
    return wanted_streams(config, config.streams, AdvancedSettings(), EVERYTHING)


def plans(selected: Any, *entries: dict[str, Any]) -> list[StreamPlan]:
    streams = wanted(selected, *entries)
    assert [item.refusal for item in streams] == [None] * len(streams)
    return [item.plan for item in streams]


def test_without_a_selection_every_stream_moves() -> None:
    empty: tuple[Any, ...] = ({}, None, {"public": []}, {"public": None})
    for nothing in empty:
        assert [str(plan.stream) for plan in plans(nothing)] == ["public.users", "sales.orders"]


def test_only_the_selected_move_in_the_catalogs_order() -> None:
    selected = {"sales": [{"stream_name": "orders"}], "public": [{"stream_name": "users"}]}
    assert [str(plan.stream) for plan in plans(selected)] == ["public.users", "sales.orders"]
    selected["public"][0]["disabled"] = True  # type: ignore[assignment]
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


def test_a_stream_that_asks_for_too_much_is_refused_by_name_and_the_others_are_not() -> None:
    selected = {
        "public": [{"stream_name": "users", "chunk_column": "id"}, {"stream_name": "gone"}],
        "sales": [{"stream_name": "orders"}],
    }
    users, orders, gone = wanted(selected)
    assert users.refusal is not None
    assert users.refusal.message == (
        "public.users: streams_config.selected_streams.public[0].chunk_column: "
        "choosing the chunk column is not supported"
    )
    assert orders.refusal is None
    assert gone.refusal is not None
    assert "public.gone: streams_config.selected_streams.public[1].stream_name: is not one of" in gone.refusal.message


def test_of_two_streams_that_share_a_table_neither_moves() -> None:
    other = {"name": "users", "namespace": "old", "destination_database": "public"}
    first, second = wanted({}, USERS, {"stream": other})
    for refused, words in ((first, "old.users goes to public.users"), (second, "public.users goes to public.users")):
        assert refused.refusal is not None
        assert words in refused.refusal.message


@pytest.mark.parametrize(
    ("selected", "entries", "words"),
    [
        ({}, [], "the source shows no stream"),
        ({"public": [{"stream_name": "users", "disabled": True}]}, [USERS], "no stream is selected"),
    ],
)
def test_no_stream_at_all_is_refused(selected: Any, entries: list[Any], words: str) -> None:
    config = parse_streams_config(json.dumps({"selected_streams": selected, "streams": entries}))
    with pytest.raises(ConnectorRefused, match=words):
        wanted_streams(config, config.streams, AdvancedSettings(), EVERYTHING)


@pytest.mark.parametrize(("text", "verify"), [("", False), ("null", False), ("{}", False), ('{"verify": true}', True)])
def test_advanced_settings_may_be_absent(text: str, verify: bool) -> None:
    assert parse_advanced_settings(text).verify is verify
