"""What a run reports: numbered log lines, sent again until they are acknowledged, and results, all bounded."""

from libs.contracts.runs import StreamResult
from libs.core.clock import ManualClock
from services.worker.report import (
    LINE_CHARACTERS_MAX,
    LINES_PER_REPORT,
    LINES_WAITING_MAX,
    VERIFICATION_BYTES_MAX,
    RunReport,
)


def test_lines_stay_until_they_are_acknowledged() -> None:
    report = RunReport(ManualClock())
    report.log("info", "one")
    report.log("error", "two\x00")
    first, lines = report.portion()
    assert (first, [line.message for line in lines]) == (0, ["one", "two"])
    assert report.portion() == (first, lines)
    report.acknowledge(first, len(lines))
    report.acknowledge(first, len(lines))
    report.log("info", "three")
    first, lines = report.portion()
    assert (first, [line.message for line in lines]) == (2, ["three"])


def test_a_portion_is_bounded() -> None:
    report = RunReport(ManualClock())
    for number in range(LINES_PER_REPORT + 1):
        report.log("info", str(number))
    assert report.more_than_a_portion
    first, lines = report.portion()
    report.acknowledge(first, len(lines))
    assert report.portion()[0] == LINES_PER_REPORT
    assert len(report.portion()[1]) == 1


def test_lines_over_the_bound_are_counted() -> None:
    report = RunReport(ManualClock())
    for number in range(LINES_WAITING_MAX + 5):
        report.log("info", str(number))
    first, lines = report.portion()
    report.acknowledge(first, len(lines))
    report.log("info", "last")
    waiting = []
    while report.portion()[1]:
        first, lines = report.portion()
        waiting += [line.message for line in lines]
        report.acknowledge(first, len(lines))
    assert waiting[-2:] == ["5 lines were left out: they came faster than they could be reported", "last"]


def test_a_portion_of_long_lines_fits_into_one_request() -> None:
    report = RunReport(ManualClock())
    for _ in range(LINES_PER_REPORT):
        report.log("info", "\N{SNOWMAN}" * LINE_CHARACTERS_MAX)
    sent = 0
    while lines := report.portion()[1]:
        assert sum(len(line.message.encode()) for line in lines) < 512 * 1024
        report.acknowledge(report.portion()[0], len(lines))
        sent += len(lines)
    assert sent == LINES_PER_REPORT


def test_many_verified_streams_fit_into_one_event_and_those_that_differ_keep_their_documents() -> None:
    document = "x" * (VERIFICATION_BYTES_MAX // 4)
    report = RunReport(ManualClock())
    for number in range(10):
        report.results.append(_result(number, document, verified=number != 9))
    bounded = report.bounded_results()
    assert [result.verified for result in bounded] == [True] * 9 + [False]
    assert [result.verification_json is not None for result in bounded] == [True] * 2 + [False] * 7 + [True]


def _result(number: int, document: str, *, verified: bool) -> StreamResult:
    return StreamResult(
        namespace="public",
        name=f"t{number}",
        rows_read=1,
        rows_written=1,
        bytes_read=1,
        seconds=0.1,
        verified=verified,
        verification_json=document,
    )
