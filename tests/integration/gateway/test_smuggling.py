"""Requests whose end two parsers could find at different places, sent to the gateway's real socket."""

import re

from tests.integration.gateway.backends import API_KEY, PROJECT
from tests.integration.gateway.conftest import Suite
from tests.integration.gateway.sockets import all_received, connected

SOURCES = f"/api/v1/project/{PROJECT}/sources"
AUTHORIZED = f"Host: x\r\nAuthorization: Bearer {API_KEY}\r\n"
HEAD = f"POST {SOURCES} HTTP/1.1\r\n{AUTHORIZED}".encode()
SMUGGLED = f"GET {SOURCES}?smuggled HTTP/1.1\r\nConnection: close\r\n{AUTHORIZED}\r\n".encode()
CHUNKED = b"2\r\nok\r\n0\r\n\r\n"

REFUSED = {
    "a length and a coding": b"Content-Length: 12\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED,
    "a coding and a length": b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n" + CHUNKED,
    "a length of 0 and a coding": b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED,
    "a coding before a colon with a space": b"Transfer-Encoding : chunked\r\n\r\n" + CHUNKED,
    "a coding after a fold": b"Transfer-Encoding:\r\n chunked\r\n\r\n" + CHUNKED,
    "a folded header": b"X-Folded: a\r\n b\r\nContent-Length: 2\r\n\r\nok",
    "a header that begins with a space": b" Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\nok",
    "an unknown coding": b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKED,
    "chunked before another coding": b"Transfer-Encoding: chunked, identity\r\n\r\n" + CHUNKED,
    "a coding in quotes": b'Transfer-Encoding: "chunked"\r\n\r\n' + CHUNKED,
    "a coding with a control character": b"Transfer-Encoding: \x0bchunked\r\n\r\n" + CHUNKED,
    "a coding with a null": b"Transfer-Encoding: chunked\0\r\n\r\n" + CHUNKED,
    "two lengths": b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok",
    "one length twice": b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nok",
    "a list of lengths": b"Content-Length: 2, 2\r\n\r\nok",
    "a length with a sign": b"Content-Length: +2\r\n\r\nok",
    "a negative length": b"Content-Length: -2\r\n\r\nok",
    "a length in hexadecimal": b"Content-Length: 0x2\r\n\r\nok",
    "a length with an underscore": b"Content-Length: 1_0\r\n\r\n0123456789",
    "a length in other digits": "Content-Length: ٢\r\n\r\nok".encode(),
    "a length beyond 64 bits": b"Content-Length: 18446744073709551618\r\n\r\nok",
    "an empty length": b"Content-Length:\r\n\r\nok",
    "a header ended by a line feed": b"X: y\nContent-Length: 2\r\n\r\nok",
    "a head ended by a line feed": b"Content-Length: 2\r\n\nok",
    "a carriage return in a value": b"X: y\rContent-Length: 2\r\n\r\nok",
    "a null in a value": b"X: a\0b\r\nContent-Length: 2\r\n\r\nok",
    "a header without a name": b": x\r\nContent-Length: 2\r\n\r\nok",
    "a name with a space": b"X Y: z\r\nContent-Length: 2\r\n\r\nok",
    "a chunk size with a sign": b"Transfer-Encoding: chunked\r\n\r\n+2\r\nok\r\n0\r\n\r\n",
    "a chunk size in hexadecimal notation": b"Transfer-Encoding: chunked\r\n\r\n0x2\r\nok\r\n0\r\n\r\n",
    "a chunk size with an underscore": b"Transfer-Encoding: chunked\r\n\r\n1_0\r\n0123456789abcdef\r\n0\r\n\r\n",
    "a chunk size beyond 64 bits": b"Transfer-Encoding: chunked\r\n\r\n10000000000000002\r\nok\r\n0\r\n\r\n",
    "a chunk that is longer than its size": b"Transfer-Encoding: chunked\r\n\r\n2\r\nokay\r\n0\r\n\r\n",
    "a chunk size ended by a line feed": b"Transfer-Encoding: chunked\r\n\r\n2\nok\r\n0\r\n\r\n",
    "a chunk ended by a line feed": b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\n0\r\n\r\n",
    "a chunk's extension without a name": b"Transfer-Encoding: chunked\r\n\r\n2;\r\nok\r\n0\r\n\r\n",
    "a length in the trailers": b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nContent-Length: 100\r\n\r\n",
    "a line feed in a chunk's extension": b"Transfer-Encoding: chunked\r\n\r\n2;a\nb\r\nok\r\n0\r\n\r\n",
}


NO_REQUESTS = {
    "three words and a version": f"GET {SOURCES} x HTTP/1.1\r\n",
    "a line feed alone": f"GET {SOURCES} HTTP/1.1 \n",
    "another version": f"GET {SOURCES} HTTP/2.0\r\n",
    "a null in the method": f"G\0T {SOURCES} HTTP/1.1\r\n",
    "no version": f"GET {SOURCES}\r\n",
}

TOO_LARGE = {
    "a value": b"X: " + b"x" * 40_000 + b"\r\n",
    "a name": b"X-" + b"x" * 40_000 + b": y\r\n",
    "all of it": b"X: y\r\n" * 10_000,
}

UNDERSTOOD = (
    b"Content-Length: 2\r\n\r\nok",
    b"content-length:2\r\n\r\nok",
    b"Content-Length: 002\r\n\r\nok",
    b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED,
    b"Transfer-Encoding: CHUNKED\r\n\r\n" + CHUNKED,
    b"Transfer-Encoding: chunked\r\n\r\n1;name=value\r\no\r\n1;x\r\nk\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n0002\r\nok\r\n000\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Trailer: y\r\n\r\n",
    b"Connection: Content-Length\r\nContent-Length: 2\r\n\r\nok",
    b"Connection: Transfer-Encoding\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED,
    b"Connection: Host, X-Request-Id, X-DataSync-Principal\r\nContent-Length: 2\r\n\r\nok",
)


async def test_an_ambiguous_request_is_rejected_and_nothing_after_it_is_read(suite: Suite) -> None:
    for case, rest in REFUSED.items():
        _assert_refused(case, await _answers(suite, HEAD + rest + SMUGGLED), b"400")


async def test_a_line_that_is_not_a_request_is_rejected(suite: Suite) -> None:
    for case, line in NO_REQUESTS.items():
        _assert_refused(case, await _answers(suite, line.encode() + b"Host: x\r\n\r\n" + SMUGGLED), b"400")


async def test_a_head_that_is_too_large_is_rejected(suite: Suite) -> None:
    for case, head in TOO_LARGE.items():
        answers = await _answers(suite, HEAD + head + b"Content-Length: 2\r\n\r\nok" + SMUGGLED)
        _assert_refused(case, answers, b"400", b"431")


async def test_an_unambiguous_request_arrives_and_so_does_the_next(suite: Suite) -> None:
    for rest in UNDERSTOOD:
        answers = await _answers(suite, HEAD + rest + SMUGGLED.replace(b"?smuggled", b"?next"))
        assert len(answers) == 2, rest
        assert b'"body":"ok"' in answers[0]
        assert b'"principal":{' in answers[0]
        assert b'?next"' in answers[1]


async def test_a_forwarded_request_has_framing_of_its_own(suite: Suite) -> None:
    """Neither the caller's framing nor its headers about the connection reach the service."""
    rest = b"Connection: close, X-Mine\r\nX-Mine: 1\r\nTrailer: X\r\nTE: trailers\r\nUpgrade: h2c\r\n"
    (answer,) = await _answers(suite, HEAD + rest + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED)
    assert b'"transfer-encoding":"chunked"' in answer
    for name in (b'"connection"', b'"x-mine"', b'"trailer"', b'"te"', b'"upgrade"', b'"content-length"'):
        assert name not in answer


async def test_a_body_that_is_cut_never_reaches_another_request(suite: Suite) -> None:
    """The rest of an announced body is not taken from the next request."""
    for head in (b"Content-Length: 100000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n10000\r\n"):
        async with connected(suite.url) as (_, writer):
            writer.write(HEAD + head + b"x" * 1000)
            await writer.drain()
        (answer,) = await _answers(suite, SMUGGLED)
        assert b'"body":""' in answer


def _assert_refused(case: str, answers: list[bytes], *statuses: bytes) -> None:
    assert len(answers) == 1, (case, answers)
    assert answers[0].split(b" ")[1] in statuses, (case, answers)
    assert b"smuggled" not in answers[0], case


async def _answers(suite: Suite, sent: bytes) -> list[bytes]:
    """All responses until the gateway ends the connection."""
    return re.split(rb"(?=HTTP/1\.[01] \d{3} )", await all_received(suite.url, sent))[1:]
