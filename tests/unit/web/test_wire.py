"""Where a response begins and ends, whatever pieces it arrives in."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.web.upstream.wire import Response, ResponseBroken

WHOLE = [
    (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok", False),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;a=b\r\no\r\n1\r\nk\r\n0\r\nX: y\r\n\r\n", b"ok", False),
    (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", b"", False),
    (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 2\r\n\r\n", b"", False),
    (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", b"ok", True),
    (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok", True),
]


@pytest.mark.parametrize(("wire", "body", "says_close"), WHOLE)
@settings(deadline=None)
@given(data=st.data())
def test_a_response_is_the_same_in_any_pieces(data: st.DataObject, wire: bytes, body: bytes, says_close: bool) -> None:
    response = Response("GET")
    for piece in _cut(data, wire):
        assert not response.is_complete
        response.feed(piece)
    assert (b"".join(response.pieces), response.is_complete, response.says_close) == (body, True, says_close)
    assert not response.has_surplus


@pytest.mark.parametrize("wire", [wire for wire, _, _ in WHOLE])
@settings(deadline=None)
@given(data=st.data())
def test_a_byte_after_the_end_is_surplus_in_any_pieces(data: st.DataObject, wire: bytes) -> None:
    response = Response("GET")
    for piece in _cut(data, wire + b"\n"):
        response.feed(piece)
    assert response.is_complete
    assert response.has_surplus


@pytest.mark.parametrize("wire", [wire for wire, _, _ in WHOLE])
@settings(deadline=None)
@given(data=st.data())
def test_an_end_before_the_end_is_not_passed_for_a_whole_response(data: st.DataObject, wire: bytes) -> None:
    response = Response("GET")
    response.feed(wire[: data.draw(st.integers(0, len(wire) - 1))])
    with pytest.raises(ResponseBroken):
        response.feed_end()


def test_a_response_without_a_length_ends_with_its_connection() -> None:
    response = Response("GET")
    response.feed(b"HTTP/1.1 200 OK\r\n\r\nok")
    assert not response.is_complete
    response.feed_end()
    assert (response.take(), response.is_complete, response.says_close) == (b"ok", True, True)


def test_the_response_to_head_has_no_body() -> None:
    response = Response("HEAD")
    response.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
    assert (response.is_complete, response.size_bytes) == (True, 2)


def _cut(data: st.DataObject, wire: bytes) -> list[bytes]:
    points = sorted(data.draw(st.sets(st.integers(1, len(wire) - 1), max_size=6)))
    return [wire[start:end] for start, end in zip([0, *points], [*points, len(wire)], strict=True)]
