"""What counts against the bounds of memory."""

from dataclasses import dataclass

from libs.core.envelope import Frozen
from libs.core.sizes import text_bytes

LONG = "x" * 100_000


class Definition(Frozen):
    streams_config_json: str


class CreateJob(Frozen):
    definition: Definition
    number: int = 1


@dataclass(frozen=True, slots=True)
class CreateSource:
    definition: Definition
    note: str | None = None


def test_texts_count_wherever_they_are() -> None:
    for value in (
        LONG,
        {"config": {"schema": LONG}},
        [LONG, 7],
        CreateJob(definition=Definition(streams_config_json=LONG)),
        CreateSource(Definition(streams_config_json=LONG)),
    ):
        assert len(LONG) <= text_bytes(value) < len(LONG) + 1_000, value


def test_a_text_counts_as_much_as_it_takes_in_memory() -> None:
    assert text_bytes("\N{SNOWMAN}" * 1_000) >= 2_000
    assert text_bytes("\N{SPOUTING WHALE}" * 1_000) >= 4_000


def test_what_has_no_texts_is_nothing() -> None:
    assert text_bytes({"numbers": [1, 2.5, None], "flag": True}) == 0
