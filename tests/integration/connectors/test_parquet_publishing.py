"""What readers see while Parquet tables are published and cleared, and after a kill at any step of it."""

import asyncio
import contextlib
import glob
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from libs.connectors.parquet.log import Log
from libs.connectors.parquet.tables import Tables
from libs.connectors.protocol import ConnectorRefused
from tests.integration.connectors.lake_writers import (
    ROWS,
    Numbers,
    clear,
    clear_table,
    context_of,
    killed_at,
    open_lake,
    pipe,
    plan_of_numbers,
    publish,
    publish_many,
    publish_version,
    stage_and_wait,
    start,
)
from tests.integration.connectors.moving import Counts

Seen = Counter[int]


def _by_pyarrow(folder: Path) -> Seen:
    return _counted(ds.dataset(folder, format="parquet").to_table())


def _by_glob(folder: Path) -> Seen:
    return _read(glob.glob(f"{folder}/**/*.parquet", recursive=True))


def _by_path(folder: Path) -> Seen:
    return _read(folder.rglob("*.parquet"))


def _by_duckdb(folder: Path) -> Seen:
    with duckdb.connect() as reader:
        query = f"SELECT version, count(*) FROM read_parquet('{folder}/**/*.parquet') GROUP BY ALL"
        return Counter(dict(reader.execute(query).fetchall()))


def _read(paths: Any) -> Seen:
    found: Seen = Counter()
    for path in list(paths):
        found += _counted(pq.ParquetFile(path).read())
    return found


def _counted(rows: pa.Table) -> Seen:
    versions: list[Any] = rows["version"].to_pylist()
    return Counter(versions)


READERS: list[Callable[[Path], Seen]] = [_by_pyarrow, _by_glob, _by_path, _by_duckdb]


@pytest.fixture(params=[True, False], ids=["swaps", "links"])
def swaps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system can swap names; if not, abandoned folders are recognised by their age alone."""
    if not request.param:
        monkeypatch.setattr("libs.connectors.parquet.tables.can_swap", lambda folder: False)
        monkeypatch.setattr("libs.connectors.parquet.staging.UNLOCKED_AGE_SECONDS", -1)
    return bool(request.param)


@pytest.mark.parametrize("below", [".", "s", "s/t"])
@pytest.mark.parametrize("reader", READERS)
async def test_every_scan_counts_each_row_once(tmp_path: Path, reader: Callable[[Path], Seen], below: str) -> None:
    for version in (1, 2, 3):
        await publish(tmp_path, version, context_of(version))
    assert reader(tmp_path / below) == {3: ROWS}


@pytest.mark.parametrize("reader", READERS)
def test_a_scan_during_publications_sees_one_version_or_fails(tmp_path: Path, reader: Callable[[Path], Seen]) -> None:
    process = start(publish_many, tmp_path, 40)
    seen: set[int] = set()
    while process.is_alive():
        for below in (".", "s", "s/t"):
            # A listed file may have been removed, and before the first publication there is none.
            with contextlib.suppress(OSError, pa.ArrowInvalid, KeyError, duckdb.IOException):
                versions = reader(tmp_path / below)
                assert len(versions) <= 1
                assert set(versions.values()) <= {ROWS}
                seen |= set(versions)
    assert process.exitcode == 0
    assert reader(tmp_path) == {40: ROWS}
    assert len(seen) > 1


async def test_a_publication_killed_at_any_step_is_whole_before_and_finished_after(tmp_path: Path, swaps: bool) -> None:
    """The next run of any job finishes what is in the log and removes what is not."""
    step, version = 0, 1
    await publish(tmp_path, version, context_of(1))
    killed = True
    while killed:
        step += 1
        killed = killed_at(step, publish_version, tmp_path, version + 1, version + 1, swaps)
        for reader in (_by_pyarrow, _by_path) if swaps else (_by_pyarrow,):
            assert reader(tmp_path / "s/t") in ({version: ROWS}, {version + 1: ROWS}), (step, reader)
            if swaps:
                # From above the tables, the files of the version that waits for the swap can't be opened.
                with contextlib.suppress(OSError, duckdb.IOException):
                    assert reader(tmp_path) in ({version: ROWS}, {version + 1: ROWS}), (step, reader)
        entry = Log(tmp_path).refresh().current["s/t"]
        await _opened_by_another_job(tmp_path)
        expected = version + (entry["run_id"] == f"run-{version + 1}")
        assert _by_pyarrow(tmp_path / "s/t") == {expected: ROWS}, step
        if swaps:
            assert _by_path(tmp_path) == {expected: ROWS}, step
        assert _left_over(tmp_path) == [], step
        version += 1
        if expected != version:
            await publish(tmp_path, version, context_of(version))
    assert step > 15


async def test_a_clearing_killed_at_any_step_is_finished_by_the_next_run_of_any_job(
    tmp_path: Path, swaps: bool
) -> None:
    step, epoch, killed, cleared = 0, 0, True, False
    while killed:
        step, epoch = step + 1, epoch + 2
        await publish(tmp_path, epoch, context_of(epoch))
        killed = killed_at(step, clear_table, tmp_path, epoch + 1, swaps)
        cleared = "s/t" not in Log(tmp_path).refresh().current
        await _opened_by_another_job(tmp_path)
        assert [path.name for path in (tmp_path / "s").iterdir()] == ([] if cleared else ["t"]), step
        if not cleared:
            assert _by_pyarrow(tmp_path / "s/t") == {epoch: ROWS}
        assert _left_over(tmp_path) == [], step
    assert step > 10
    assert cleared


@pytest.mark.parametrize("sweeper", ["run", "check"])
async def test_the_staging_of_a_living_writer_is_kept_and_that_of_a_killed_one_swept(
    tmp_path: Path, sweeper: str
) -> None:
    """By the next run of any job, or by a connection test if no job is left."""
    ours, theirs = pipe()
    process = start(stage_and_wait, tmp_path, theirs)
    assert ours.poll(30)
    staged = [path for path in _left_over(tmp_path) if path.suffix == ".rows"]
    assert staged
    await _opened_by_another_job(tmp_path)
    await open_lake(tmp_path).check()
    assert all(path.exists() for path in staged)
    process.kill()
    process.join()
    if sweeper == "run":
        await _opened_by_another_job(tmp_path)
    else:
        await open_lake(tmp_path).check()
    assert _left_over(tmp_path) == []


async def test_names_joined_alike_are_different_streams(tmp_path: Path) -> None:
    """``"s"."t.u"`` was committed before the run was resumed, ``"s.t"."u"`` was not."""
    first, second = plan_of_numbers("t.u", "s"), plan_of_numbers("u", "s.t")
    await publish(tmp_path, 1, context_of(1, run_id="same"), first)
    async with open_lake(tmp_path).open(context_of(1, run_id="same")) as resumed:
        assert await resumed.committed(first) is not None
        assert await resumed.committed(second) is None


async def test_a_committed_table_whose_files_were_removed_is_written_again(tmp_path: Path) -> None:
    context = context_of(1)
    await publish(tmp_path, 1, context)
    (tmp_path / "s/t").rename(tmp_path / "elsewhere")
    async with open_lake(tmp_path).open(context) as resumed:
        assert await resumed.committed(plan_of_numbers()) is None
    (tmp_path / "elsewhere").rename(tmp_path / "s/t")
    next((tmp_path / "s/t").glob("*.parquet")).unlink()
    async with open_lake(tmp_path).open(context) as resumed:
        assert await resumed.committed(plan_of_numbers()) is None


async def test_links_of_an_earlier_version_become_folders_with_the_next_publication(tmp_path: Path) -> None:
    old, kept = (tmp_path / f"_datasync/versions/job-1-epoch-{epoch}-{'0' * 32}" for epoch in (2, 1))
    for folder in (old, kept):
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"version": [1] * ROWS}), folder / "part-0-00000.parquet")
    (tmp_path / "s").mkdir()
    (tmp_path / "s/t").symlink_to(f"../_datasync/versions/{old.name}")
    _write_old_log(tmp_path, [kept.name, old.name])
    await _opened_by_another_job(tmp_path)
    assert _by_pyarrow(tmp_path / "s/t") == {1: ROWS}
    async with open_lake(tmp_path).open(context_of(2, run_id="run")) as resumed:
        assert await resumed.committed(plan_of_numbers()) is not None
    await publish(tmp_path, 3, context_of(3))
    assert not (tmp_path / "s/t").is_symlink()
    assert all(reader(tmp_path) == {3: ROWS} for reader in READERS)
    assert list((tmp_path / "_datasync/versions").iterdir()) == []


async def test_a_link_that_a_killed_run_did_not_update_is_updated_by_the_next_run_of_any_job(tmp_path: Path) -> None:
    """A worker of an earlier version was killed after its entry was in the log and before it replaced the link."""
    folders = [f"job-1-epoch-{epoch}-{'0' * 32}" for epoch in (1, 2)]
    for version, name in enumerate(folders, 1):
        (tmp_path / "_datasync/versions" / name).mkdir(parents=True)
        path = tmp_path / "_datasync/versions" / name / "part-0-00000.parquet"
        pq.write_table(pa.table({"version": [version] * ROWS}), path)
    (tmp_path / "s").mkdir()
    (tmp_path / "s/t").symlink_to(f"../_datasync/versions/{folders[0]}")
    _write_old_log(tmp_path, folders)
    await _opened_by_another_job(tmp_path)
    assert _by_pyarrow(tmp_path / "s/t") == {2: ROWS}


async def test_where_names_can_not_be_swapped_links_show_one_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("libs.connectors.parquet.tables.can_swap", lambda folder: False)
    for version in (1, 2):
        await publish(tmp_path, version, context_of(version))
    assert (tmp_path / "s/t").is_symlink()
    assert _by_pyarrow(tmp_path / "s/t") == _by_path(tmp_path) == {2: ROWS}
    monkeypatch.undo()
    await publish(tmp_path, 3, context_of(3))
    assert not (tmp_path / "s/t").is_symlink()
    assert _by_path(tmp_path) == {3: ROWS}


async def test_a_lower_epoch_that_resumes_before_its_swap_leaves_the_later_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was paused between its log entry and the swap, and resumes after a higher epoch has published."""
    reconcile, reached, resumed = Tables.reconcile, threading.Event(), threading.Event()

    def paused_once(tables: Tables, *arguments: Any) -> None:
        if not reached.is_set():
            reached.set()
            assert resumed.wait(30)
        reconcile(tables, *arguments)

    async with open_lake(tmp_path).open(context_of(1)) as paused:
        monkeypatch.setattr(Tables, "reconcile", paused_once)
        writing = asyncio.create_task(paused.write(Numbers(plan_of_numbers(), 1), Counts()))
        assert await asyncio.to_thread(reached.wait, 30)
        await publish(tmp_path, 2, context_of(2))
        assert _by_path(tmp_path) == {2: ROWS}
        resumed.set()
        await writing
        assert _by_path(tmp_path) == {2: ROWS}
    assert _by_path(tmp_path) == {2: ROWS}
    assert _left_over(tmp_path) == []


async def test_a_folder_that_holds_another_table_is_not_replaced(tmp_path: Path) -> None:
    """As on a file system that does not distinguish ``T`` from ``t``."""
    await publish(tmp_path, 1, context_of(1))
    (tmp_path / "s/t").rename(tmp_path / "s/T")
    with pytest.raises(ConnectorRefused, match="s/T holds the table s/t"):
        await publish(tmp_path, 2, context_of(2), plan_of_numbers("T"))


@pytest.mark.parametrize("name", ["mine.parquet", "_SUCCESS", ".notes"])
async def test_a_foreign_file_in_a_tables_folder_is_not_touched(tmp_path: Path, name: str) -> None:
    await publish(tmp_path, 1, context_of(1))
    (tmp_path / "s/t" / name).write_bytes(b"mine")
    with pytest.raises(ConnectorRefused, match=rf"{re.escape(name)} was not written by DataSync"):
        await publish(tmp_path, 2, context_of(2))
    assert (tmp_path / "s/t" / name).read_bytes() == b"mine"


async def test_a_folder_that_the_log_does_not_know_is_not_touched(tmp_path: Path) -> None:
    """For example one that was copied from another destination."""
    await publish(tmp_path / "first", 1, context_of(1))
    (tmp_path / "second/s").mkdir(parents=True)
    (tmp_path / "first/s/t").rename(tmp_path / "second/s/t")
    with pytest.raises(ConnectorRefused, match="was not written by DataSync"):
        await publish(tmp_path / "second", 2, context_of(2))
    assert _by_path(tmp_path / "second") == {1: ROWS}


@pytest.mark.parametrize("name", [".", "..", ".t", "_t", "_datasync", "a=b", "a/b", "%2E", "t.u", "a b", "é-", "*"])
async def test_no_name_of_a_table_hides_its_rows_or_adds_a_column(tmp_path: Path, name: str) -> None:
    await publish(tmp_path, 1, context_of(1), plan_of_numbers(name, name))
    assert _by_pyarrow(tmp_path) == _by_glob(tmp_path) == _by_duckdb(tmp_path) == {1: ROWS}
    with duckdb.connect() as reader:
        found = reader.execute(f"SELECT * FROM read_parquet('{tmp_path}/**/*.parquet') LIMIT 1")
        assert [column[0] for column in found.description or ()] == ["version", "id"]


async def test_a_table_keeps_the_folder_that_an_earlier_version_named(tmp_path: Path) -> None:
    (tmp_path / "_datasync").mkdir()
    await publish(tmp_path, 1, context_of(1), plan_of_numbers("_t"))
    for path in (tmp_path / "_datasync").glob("0*.json"):
        path.write_text(path.read_text().replace("s/%5Ft", "s/_t"))
    (tmp_path / "s/%5Ft/_datasync_version.json").write_text(
        (tmp_path / "s/%5Ft/_datasync_version.json").read_text().replace("s/%5Ft", "s/_t")
    )
    (tmp_path / "s/%5Ft").rename(tmp_path / "s/_t")
    await publish(tmp_path, 2, context_of(2), plan_of_numbers("_t"))
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["_t"]
    assert _by_path(tmp_path) == {2: ROWS}


async def test_clearing_removes_a_table_and_leaves_nothing(tmp_path: Path) -> None:
    await publish(tmp_path, 1, context_of(1))
    await clear(tmp_path, context_of(2))
    assert list((tmp_path / "s").iterdir()) == []
    assert _left_over(tmp_path) == []


async def _opened_by_another_job(root: Path) -> None:
    async with open_lake(root).open(context_of(time.time_ns(), job_id=2)):
        pass


def _left_over(root: Path) -> list[Path]:
    return [path for path in (root / "_datasync/staging").rglob("*") if path.is_file() or path.is_symlink()]


def _write_old_log(root: Path, folders: list[str]) -> None:
    """Entries as earlier versions wrote them, without the version's name."""
    for number, name in enumerate(folders, 1):
        entry = {
            "kind": "publish", "stream": "s.t", "table": "s/t", "folder": f"_datasync/versions/{name}", "rows": ROWS,
            "files": [], "job_id": 1, "epoch": number, "run_id": f"run-{number}",
        }  # fmt: skip
        (root / f"_datasync/{number:08d}.json").write_text(json.dumps(entry))
