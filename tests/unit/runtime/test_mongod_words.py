"""What mongod says when it can't go on."""

from pathlib import Path

from libs.runtime.mongod import last_words

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
