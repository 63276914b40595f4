"""What mongod says when it can't go on."""

from pathlib import Path

import pytest

from libs.suite import mongod as mongod_module
from libs.suite.mongod import last_words

LOG = b"""{"s":"I","c":"CONTROL","msg":"starting","attr":{"pid":1}}
{"s":"E","c":"STORAGE","msg":"WiredTiger error","attr":{"error":28,"message":"fsync: No space left on device"}}
{"s":"F","c":"ASSERT","msg":"Fatal assertion","attr":{"msgid":50853}}
{"s":"F","c":"ASSERT","msg":"***aborting after fassert() failure"}
"""


def test_its_errors_are_told_and_not_those_of_an_earlier_process(tmp_path: Path) -> None:
    path = tmp_path / "mongod.log"
    earlier = b"mongod: error while loading shared libraries: libcurl.so.4\n"
    path.write_bytes(earlier + LOG)
    assert last_words(path, len(earlier)) == [
        "WiredTiger error: fsync: No space left on device",
        'Fatal assertion: {"msgid": 50853}',
        "***aborting after fassert() failure",
    ]
    assert last_words(path)[0] == "mongod: error while loading shared libraries: libcurl.so.4"


def test_only_whole_lines_and_warnings_that_name_a_cause_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mongod.log"
    wanted = b"""{"s":"W","c":"STORAGE","msg":"Low on disk space","attr":{}}
{"s":"W","c":"NETWORK","msg":"Client has attempted to use a deprecated option","attr":{}}
{"s":"E","c":"CONTROL","msg":"Error setting up listener","attr":{"error":"Address already in use"}}
"""
    cut = b'{"s":"E","c":"STORAGE","msg":"not wri'
    path.write_bytes(b'{"s":"I","c":"CONTROL","msg":"' + b"x" * 1000 + b'"}\n' + wanted + cut)
    monkeypatch.setattr(mongod_module, "_TOLD_BYTES_MAX", len(wanted) + len(cut) + 500)
    assert last_words(path) == ["Low on disk space", "Error setting up listener: Address already in use"]
