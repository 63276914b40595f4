"""Time as the API tells it."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.core.clock import duration_text, isoformat_z, whole_milliseconds

MOMENTS = st.datetimes(
    min_value=datetime(1000, 1, 2),  # noqa: DTZ001 - hypothesis adds the zone
    max_value=datetime(9999, 12, 30),  # noqa: DTZ001
    timezones=st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes))),
)


@given(moment=MOMENTS)
def test_a_moment_reads_back_whatever_its_zone(moment: datetime) -> None:
    text = isoformat_z(moment)
    assert datetime.fromisoformat(text) == whole_milliseconds(moment.astimezone(UTC))
    assert (len(text), text[-1]) == (24, "Z")


@pytest.mark.parametrize(("microseconds", "fraction"), [(0, "000"), (5_000, "005"), (678_999, "678")])
def test_the_fraction_has_three_digits(microseconds: int, fraction: str) -> None:
    moment = datetime(2026, 2, 21, 10, 30, microsecond=microseconds, tzinfo=UTC)
    assert isoformat_z(moment) == f"2026-02-21T10:30:00.{fraction}Z"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.254, "0.25 s"),
        (30.0, "30 s"),
        (59.996, "1 min"),
        (125.4, "2 min 5 s"),
        (600.0, "10 min"),
        (3_599.6, "1 h"),
        (5_400.0, "1 h 30 min"),
        (90_000.0, "25 h"),
    ],
)
def test_a_duration_is_written_for_people(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
