"""Logs tell what happened and no secret."""

import logging
from collections.abc import Callable

import orjson
import pytest
import structlog

from libs.process.logs import configure_logs, redact, redact_text
from libs.process.settings import ServiceSettings
from libs.process.telemetry import server_span

Written = Callable[[], str]


@pytest.fixture
def written(logs_put_back: None, capsys: pytest.CaptureFixture[str]) -> Written:
    """What a service that logs JSON has written since it was last asked."""
    configure_logs("catalog", ServiceSettings(log_format="json"))
    return lambda: capsys.readouterr().out


def test_a_line_is_one_json_object_with_its_service_and_level(written: Written) -> None:
    structlog.get_logger().info("source_created", source_id=7)
    line = orjson.loads(written())
    assert (line["event"], line["service"], line["level"], line["source_id"]) == (
        "source_created",
        "catalog",
        "info",
        7,
    )
    assert line["timestamp"].endswith("Z")


def test_lines_of_a_request_carry_its_ids(written: Written) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    with (
        structlog.contextvars.bound_contextvars(request_id="r-1"),
        server_span("GET", {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}),
    ):
        structlog.get_logger().info("something")
    line = orjson.loads(written())
    assert (line["request_id"], line["trace_id"]) == ("r-1", trace_id)


def test_lines_of_libraries_have_the_same_form_and_are_masked_too(written: Written) -> None:
    # Anew, because pytest gives every phase of a test a standard output of its own.
    configure_logs("catalog", ServiceSettings(log_format="json"))
    logging.getLogger("aiohttp").warning("connecting to %s", "mongodb://user:hunter2@host/db")
    line = orjson.loads(written())
    assert (line["event"], line["logger"]) == ("connecting to mongodb://user:***@host/db", "aiohttp")


def test_a_traceback_is_masked_too(written: Written) -> None:
    try:
        raise ValueError("postgresql://u:hunter2@h/d refused")
    except ValueError as error:
        structlog.get_logger().error("failed", exc_info=error)
    line = written()
    assert "ValueError" in line
    assert "hunter2" not in line


@pytest.mark.parametrize(
    "key",
    ["password", "user_password", "Authorization", "api_key", "apiKey", "secret", "s3_secret_key", "token", "Cookie"],
)
def test_values_under_telling_keys_are_masked_at_any_depth(key: str) -> None:
    event = redact(None, "info", {"event": "e", key: "hunter2", "config": {"inner": [{key: "hunter2"}]}})
    assert "hunter2" not in str(event)


def test_numbers_and_names_are_left_as_they_are() -> None:
    event = {"event": "run_finished", "rows": 5, "token_count": 3, "name": "orders", "ok": True}
    assert redact(None, "info", dict(event)) == event


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("postgresql://u:p@host:5432/db", "postgresql://u:***@host:5432/db"),
        ("postgresql://u:p@ss@host/db", "postgresql://u:***@host/db"),
        ("mongodb://u:p@a:1,b:2/?x=y", "mongodb://u:***@a:1,b:2/?x=y"),
        ("http://host:8080/a@b", "http://host:8080/a@b"),
        ("Authorization: Bearer abcdefghijk", "Authorization: Bearer ***"),
        ("key ds_live_0123456789abc", "key ds_live_***"),
        ("client ds_ocs_0123456789abc", "client ds_ocs_***"),
        ("grant ds_oat_0123456789abc", "grant ds_oat_***"),
        ("host=h password=hunter2 user=u", "host=h password=*** user=u"),
    ],
)
def test_credentials_are_masked_in_text(text: str, masked: str) -> None:
    assert redact_text(text) == masked
