"""Reports: numbered lines, changed progress and results, in portions that fit a request, until acknowledged."""

from libs.connectors.protocol import StreamName, StreamPlan, Target
from libs.contracts.internal import LogLine, StreamProgress
from libs.contracts.runs import StreamResult
from libs.core.clock import ManualClock
from services.worker.report import (
    LINE_CHARACTERS_MAX,
    LINES_PER_REPORT,
    LINES_WAITING_MAX,
    VERIFICATION_BYTES_MAX,
    Portion,
    Report,
    StreamReport,
)


def stream(name: str) -> StreamReport:
    return StreamReport(StreamPlan(StreamName("public", name), Target("public", name)))


def delivered(report: Report) -> list[Portion]:
    """Everything that is due, acknowledged portion by portion."""
    portions = [report.portion()]
    report.acknowledge(portions[0])
    while portions[-1].has_more:
        portions.append(report.portion())
        report.acknowledge(portions[-1])
    return portions


def lines_of(portions: list[Portion]) -> list[LogLine]:
    return [line for portion in portions for line in portion.lines]


def progress_of(portions: list[Portion]) -> list[StreamProgress]:
    return [progress for portion in portions for progress in portion.progress]


def test_lines_are_sent_again_until_they_are_acknowledged() -> None:
    report = Report(ManualClock())
    report.log("info", "one")
    report.log("error", "two\x00")
    portion = report.portion()
    assert (portion.first_line, [line.message for line in portion.lines]) == (0, ["one", "two"])
    assert report.portion() == portion
    report.acknowledge(portion)
    report.acknowledge(portion)
    report.log("info", "three")
    assert (report.portion().first_line, [line.message for line in report.portion().lines]) == (2, ["three"])


def test_a_portion_has_a_limited_number_of_lines() -> None:
    report = Report(ManualClock())
    for number in range(LINES_PER_REPORT + 1):
        report.log("info", str(number))
    assert report.portion().has_more
    assert [(portion.first_line, len(portion.lines)) for portion in delivered(report)] == [
        (0, LINES_PER_REPORT),
        (LINES_PER_REPORT, 1),
    ]


def test_lines_beyond_the_limit_are_counted() -> None:
    report = Report(ManualClock())
    for number in range(LINES_WAITING_MAX + 5):
        report.log("info", str(number))
    report.acknowledge(report.portion())
    report.log("info", "last")
    assert [line.message for line in lines_of(delivered(report))[-2:]] == [
        "5 lines were dropped because they came faster than they could be reported",
        "last",
    ]


def test_a_portion_of_long_lines_fits_one_request() -> None:
    report = Report(ManualClock())
    for _ in range(LINES_PER_REPORT):
        report.log("info", "\N{SNOWMAN}" * LINE_CHARACTERS_MAX)
    portions = delivered(report)
    assert len(lines_of(portions)) == LINES_PER_REPORT
    assert all(sum(len(line.message.encode()) for line in portion.lines) < 512 * 1024 for portion in portions)


def test_only_streams_that_changed_since_the_last_acknowledged_report_are_sent() -> None:
    moving, waiting = stream("moving"), stream("waiting")
    report = Report(ManualClock(), [moving, waiting])
    assert [item.name for item in report.portion().progress] == ["moving", "waiting"]
    report.acknowledge(report.portion())
    assert report.portion().progress == ()
    moving.add(rows_read=5)
    portion = report.portion()
    assert [(item.name, item.rows_read) for item in portion.progress] == [("moving", 5)]
    moving.add(rows_read=1)
    report.acknowledge(portion)
    assert [(item.name, item.rows_read) for item in report.portion().progress] == [("moving", 6)]


def test_the_last_portions_carry_every_stream_and_every_result_once() -> None:
    names = [f"a table with a rather long name {number}" for number in range(5_000)]
    report = Report(ManualClock(), [stream(name) for name in names], [result(name) for name in names])
    delivered(report)
    assert report.portion().results == ()
    report.conclude(with_results=True)
    portions = delivered(report)
    assert len(portions) > 1
    assert [item.name for item in progress_of(portions)] == names
    assert [item.name for portion in portions for item in portion.results] == names


def test_work_that_is_given_back_reports_no_results() -> None:
    report = Report(ManualClock(), [stream("a")], [result("a")])
    report.conclude(with_results=False)
    assert [(len(portion.progress), portion.results) for portion in delivered(report)] == [(1, ())]


def test_of_many_verification_documents_those_that_show_a_difference_are_kept() -> None:
    document = "x" * (VERIFICATION_BYTES_MAX // 4)
    results = [result(str(number), document, verified=number != 9) for number in range(10)]
    report = Report(ManualClock(), results=results)
    report.conclude(with_results=True)
    bounded = [item for portion in delivered(report) for item in portion.results]
    assert [item.verified for item in bounded] == [True] * 9 + [False]
    assert [item.verification_json is not None for item in bounded] == [True] * 2 + [False] * 7 + [True]


def result(name: str, document: str | None = None, *, verified: bool | None = None) -> StreamResult:
    return StreamResult(
        namespace="public",
        name=name,
        rows_read=1,
        rows_written=1,
        bytes_read=1,
        seconds=0.1,
        verified=verified,
        verification_json=document,
    )
