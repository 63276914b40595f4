"""Versions, configurations, masks and catalogs of streams, as requests give them."""

from typing import Any

import pytest

from libs.core.errors import InvalidInput
from services.catalog.inputs import config_object
from services.catalog.masks import Mask, parse_mask, secrets_in, starred, with_secrets
from services.catalog.streams import merged_catalog, new_catalog
from services.catalog.versions import canonical_version

PATHS = [("password",), ("ssl", "client_key")]
CONFIG: dict[str, Any] = {"host": "db", "password": "p", "ssl": {"mode": "require", "client_key": ""}}


@pytest.mark.parametrize(
    ("text", "version"), [("latest", "v1.0.0"), ("v1.0.0", "v1.0.0"), ("0.6.0", "v0.6.0"), (" v0.10.2 ", "v0.10.2")]
)
def test_a_version_has_one_spelling(text: str, version: str) -> None:
    assert canonical_version(text) == version


@pytest.mark.parametrize("text", ["", "v0.5.9", "v1.0.1", "1", "1.0", "v01.0.0", "newest", "1.0.0-rc1", "9" * 60])
def test_what_is_no_version_of_ours_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        canonical_version(text)


def test_a_configuration_may_be_a_text_that_holds_it() -> None:
    assert config_object('{"a": 1}') == config_object({"a": 1}) == {"a": 1}
    wrong_ones: list[Any] = ["[]", "1", 1, None, [], "{"]
    for wrong in wrong_ones:
        with pytest.raises(InvalidInput):
            config_object(wrong)


def test_secrets_are_found_and_replaced_without_touching_the_original() -> None:
    assert secrets_in(CONFIG, PATHS) == {("password",): "p"}
    replaced = with_secrets(CONFIG, {("password",): "q", ("ssl", "client_key"): "k"})
    assert (replaced["password"], replaced["ssl"]["client_key"]) == ("q", "k")
    assert (CONFIG["password"], CONFIG["ssl"]["client_key"]) == ("p", "")
    assert secrets_in({"ssl": "no object", "password": 7}, PATHS) == {}


def test_a_mask_reads_back_and_nothing_else_does() -> None:
    mask = Mask("source", 42, "ssl.client_key", "A" * 22)
    assert parse_mask(str(mask)) == mask
    for text in ("********", "secret", str(mask)[1:], f"{mask}x", str(mask).replace("source", "job"), f"{mask}\n"):
        assert parse_mask(text) is None


def test_what_is_not_stored_is_starred_and_masks_stay() -> None:
    assert starred(CONFIG, PATHS)["password"] == "********"
    masked = {"password": str(Mask("source", 1, "password", "B" * 22))}
    assert starred(masked, PATHS) == masked


STREAM = {"name": "flights", "namespace": "public", "supported_sync_modes": ["full_refresh", "incremental"]}


def test_a_new_catalog_selects_every_stream() -> None:
    catalog = new_catalog([{"stream": STREAM}, {"stream": {"name": "free"}}])
    assert {
        namespace: [item["stream_name"] for item in chosen] for namespace, chosen in catalog["selected_streams"].items()
    } == {
        "public": ["flights"],
        "": ["free"],
    }


def test_a_saved_choice_holds_for_what_is_still_there() -> None:
    saved = {
        "selected_streams": {"public": [{"stream_name": "flights"}, {"stream_name": "gone"}], "old": [{}], "odd": 7},
        "streams": [{"stream": {**STREAM, "sync_mode": "incremental", "cursor_field": "id", "extra": 1}}, "odd"],
    }
    merged = merged_catalog([{"stream": STREAM}, {"stream": {"name": "new", "namespace": "public"}}], saved)
    assert merged["selected_streams"] == {"public": [{"stream_name": "flights"}]}
    assert merged["streams"][0]["stream"] == {**STREAM, "sync_mode": "incremental", "cursor_field": "id"}
    assert merged["streams"][1]["stream"] == {"name": "new", "namespace": "public"}


@pytest.mark.parametrize("saved", [None, [], {}, {"selected_streams": [], "streams": {}}, "text"])
def test_a_saved_choice_that_is_none_selects_nothing(saved: Any) -> None:
    assert merged_catalog([{"stream": STREAM}], saved)["selected_streams"] == {}
