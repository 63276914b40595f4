"""The log of a Parquet destination: one order for all writers, and no longer than it has to be."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from libs.connectors.parquet import log as parquet_log
from libs.connectors.parquet.log import CHECKPOINT_ENTRIES, Log, LogState, refuse_fenced
from libs.connectors.protocol import ConnectorUnavailable, Fenced
from tests.integration.connectors.moving import context_of


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "_datasync").mkdir()
    return tmp_path


def _epoch(epoch: int, job_id: int = 1) -> dict[str, Any]:
    return {"kind": "epoch", "job_id": job_id, "epoch": epoch}


def _publication(table: str, number: int) -> dict[str, Any]:
    return {"kind": "publish", "job_id": 1, "epoch": 1, "table": table, "folder": f"folder-{number}", "rows": number}


def _accept(_: LogState) -> None:
    """Whatever the state is."""


def _names(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "_datasync").iterdir())


def test_entries_added_at_the_same_time_get_different_numbers(root: Path) -> None:
    first, second = Log(root), Log(root)
    raced: list[bool] = []

    def overtaken(_: object) -> None:
        if not raced:
            raced.append(True)
            second.append(_epoch(7, job_id=2), _accept)

    state = first.append(_epoch(3), overtaken)
    assert (state.number, state.epochs) == (2, {1: 3, 2: 7})
    assert _names(root) == ["00000001.json", "00000002.json"]
    assert json.loads((root / "_datasync/00000002.json").read_text())["job_id"] == 1


def test_a_long_log_is_a_checkpoint_and_few_entries_and_says_the_same(root: Path) -> None:
    writer = Log(root)
    last = 5 * CHECKPOINT_ENTRIES + 7
    for number in range(1, last + 1):
        writer.append(_publication(f"s/t{number % 10}", number), _accept)
    writer.append({"kind": "clear", "job_id": 1, "epoch": 1, "table": "s/t0"}, _accept)
    state = Log(root).refresh()
    assert state == writer.state
    assert {table: entry["rows"] for table, entry in state.current.items()} == {
        f"s/t{digit}": last - (last - digit) % 10 for digit in range(1, 10)
    }
    entries = [name for name in _names(root) if not name.startswith("checkpoint")]
    assert entries == [f"{number:08d}.json" for number in range(5 * CHECKPOINT_ENTRIES + 1, last + 2)]


def test_the_log_of_an_earlier_version_is_read_and_compacted_by_the_next_entry(root: Path) -> None:
    expected = LogState()
    for number in range(1, 3 * CHECKPOINT_ENTRIES + 50):
        expected.apply(number, _publication(f"s/t{number % 3}", number))
        (root / f"_datasync/{number:08d}.json").write_text(json.dumps(_publication(f"s/t{number % 3}", number)))
    assert Log(root).refresh() == expected
    Log(root).append(_epoch(1), _accept)
    assert len(_names(root)) == 51
    assert Log(root).refresh().current == expected.current


def test_a_writer_that_slept_through_a_compaction_can_not_take_a_freed_number(root: Path) -> None:
    """It would believe that its entry stands, although no reader ever sees it."""
    sleeper, others = Log(root), Log(root)
    slept: list[bool] = []

    def sleep(state: LogState) -> None:
        refuse_fenced(context_of(epoch=3))(state)
        if not slept:
            slept.append(True)
            for _ in range(2 * CHECKPOINT_ENTRIES):
                others.append(_epoch(4), _accept)

    with pytest.raises(Fenced):
        sleeper.append(_epoch(3), sleep)
    assert slept
    assert Log(root).refresh().epochs == {1: 4}
    assert "00000001.json" not in _names(root)


def test_writers_and_readers_at_once_agree_while_the_log_is_compacted(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_log, "CHECKPOINT_ENTRIES", 5)
    monkeypatch.setattr("libs.connectors.parquet.log.os.fsync", lambda descriptor: None)
    writers, entries = 4, 60
    done = threading.Event()

    def write(job_id: int) -> None:
        log = Log(root)
        for epoch in range(1, entries + 1):
            assert (
                log.append(_epoch(epoch, job_id), refuse_fenced(context_of(epoch=epoch, job_id=job_id))).epochs[job_id]
                == epoch
            )

    def read() -> int:
        read, last = 0, 0
        while not done.is_set():
            number = Log(root).refresh().number
            assert number >= last
            read, last = read + 1, number
        return read

    with ThreadPoolExecutor(writers + 1) as pool:
        reading = pool.submit(read)
        try:
            for writing in [pool.submit(write, job_id) for job_id in range(1, writers + 1)]:
                writing.result(60)
        finally:
            done.set()
        assert reading.result(60) > 0
    state = Log(root).refresh()
    assert state.epochs == dict.fromkeys(range(1, writers + 1), entries)
    # An entry that a checkpoint took in before its writer looked is added again, and says the same.
    assert state.number >= writers * entries


def test_a_checkpoint_that_could_not_be_written_is_made_up_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Log, "_make", full)
    for epoch in range(1, CHECKPOINT_ENTRIES + 2):
        Log(root).append(_epoch(epoch), _accept)
    monkeypatch.undo()
    assert len(_names(root)) == CHECKPOINT_ENTRIES + 1
    Log(root).append(_epoch(CHECKPOINT_ENTRIES + 2), _accept)
    assert len(_names(root)) == 3
    assert Log(root).refresh().epochs == {1: CHECKPOINT_ENTRIES + 2}


def test_a_log_with_a_gap_is_said_to_be_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_log, "CATCH_UP_SECONDS_MAX", 0.0)
    (root / "_datasync/00000002.json").write_text(json.dumps(_epoch(1)))
    with pytest.raises(ConnectorUnavailable, match="entry 1 of the log"):
        Log(root).refresh()


def test_a_checkpoint_of_a_newer_version_is_not_read_as_an_old_one(root: Path) -> None:
    (root / "_datasync/checkpoint-00000100.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(ConnectorUnavailable, match="newer version"):
        Log(root).refresh()
