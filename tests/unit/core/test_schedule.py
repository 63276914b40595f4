"""Frequencies as people write them, and the ticks that follow from them."""

from datetime import UTC, datetime

import pytest

from libs.core.errors import InvalidInput
from libs.core.schedule import latest_tick, next_tick, parse_frequency


@pytest.mark.parametrize(
    ("text", "cron"),
    [
        ("", ""),
        ("   ", ""),
        ("*/5 * * * *", "*/5 * * * *"),
        ("  0   9  * *  MON-FRI ", "0 9 * * MON-FRI"),
        ("@hourly", "0 * * * *"),
        ("@Daily", "0 0 * * *"),
        ("@midnight", "0 0 * * *"),
        ("@weekly", "0 0 * * 0"),
        ("@monthly", "0 0 1 * *"),
        ("@yearly", "0 0 1 1 *"),
        ("@annually", "0 0 1 1 *"),
        ("every minute", "* * * * *"),
        ("every 1 minutes", "* * * * *"),
        ("every 15 minutes", "*/15 * * * *"),
        ("Every 15 Min", "*/15 * * * *"),
        ("every 60 minutes", "0 * * * *"),
        ("every hour", "0 * * * *"),
        ("every 6 hours", "0 */6 * * *"),
        ("every 24 hours", "0 0 * * *"),
        ("every day", "0 0 * * *"),
        ("every week", "0 0 * * 0"),
        ("every month", "0 0 1 * *"),
    ],
)
def test_a_frequency_becomes_a_cron_expression(text: str, cron: str) -> None:
    assert parse_frequency(text) == cron


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("* * * *", "four"),
        ("0 * * * * *", "has 6 fields; a cron expression has five"),
        ("0 0 * * * * 2026", "has 7 fields; a cron expression has five"),
        ("61 * * * *", "not a cron expression"),
        ("* 24 * * *", "not a cron expression"),
        ("0 0 30 2 *", "not a cron expression"),
        ("a b c d e", "not a cron expression"),
        ("@reboot", "not known"),
        ("@every 5m", "not known"),
        ("every 7 minutes", "cannot be written as a cron expression"),
        ("every 0 minutes", "cannot be written as a cron expression"),
        ("every 2 days", "cannot be written as a cron expression"),
        ("every 5 fortnights", "is not a frequency"),
        ("everyminute", "is not a frequency"),
        ("TZ=UTC * * * * *", "has 6 fields"),
        ("* " * 150, "longer than"),
    ],
)
def test_another_frequency_is_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        parse_frequency(text)
    assert refusal.value.errors[0].field == "frequency"
    if words != "four":
        assert words in refusal.value.message


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def test_the_next_tick_is_after_the_moment_and_the_latest_at_or_before_it() -> None:
    on_the_tick = moment("2026-03-01T10:15:00")
    assert next_tick("*/15 * * * *", on_the_tick) == moment("2026-03-01T10:30:00")
    assert latest_tick("*/15 * * * *", on_the_tick) == on_the_tick
    assert latest_tick("*/15 * * * *", moment("2026-03-01T10:15:00.500")) == on_the_tick
    assert latest_tick("*/15 * * * *", moment("2026-03-01T10:29:59.999")) == on_the_tick
