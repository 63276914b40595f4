"""Log lines on their way: numbered, bounded, sent again until they are acknowledged."""

from libs.core.clock import ManualClock
from services.worker.report import LINES_PER_REPORT, LINES_WAITING_MAX, RunReport


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
