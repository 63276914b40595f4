"""Requests at the edges of HTTP are answered alike by the gateway and by a service that gets them directly."""

import asyncio
import re
import socket
from collections.abc import Mapping
from contextlib import suppress

import pytest
from pydantic import SecretStr

from libs.core.principal import Principal
from libs.web.principals import PRINCIPAL_HEADER, PrincipalSigner
from tests.integration.gateway.backends import BOOTSTRAP_KEY, GATEWAY_KEY
from tests.integration.gateway.conftest import RealAuth

ADA = Principal(kind="user", subject="1", name="ada", projects={123: "owner"}, scopes=("*",))
KEYS = "/api/v2/keys"
BODY = b'{"name": "ci", "permission": "read-only"}'
JSON = "Content-Type: application/json"
LENGTH = f"Content-Length: {len(BODY)}"


@pytest.fixture
def ends(real_auth: RealAuth) -> Mapping[str, str]:
    """The header with the credential by the URL that accepts it: the gateway's, and that of auth alone."""
    principal = PrincipalSigner("gateway", SecretStr(GATEWAY_KEY)).sign(ADA, "auth")
    return {
        real_auth.url: f"Authorization: Bearer {BOOTSTRAP_KEY}",
        real_auth.auth_url: f"{PRINCIPAL_HEADER}: {principal}",
    }


def numbered(count: int) -> list[str]:
    return [f"X-{number}: y" for number in range(count)]


EDGES: Mapping[str, tuple[str, list[str], int]] = {
    # RFC 9110 section 14.2: a server may ignore Range, and then answers all of it.
    "a range": (f"GET {KEYS}", ["Range: bytes=0-3"], 200),
    "a range beyond the end": (f"GET {KEYS}", ["Range: bytes=99999999999999999999-"], 200),
    "a range on a condition": (f"GET {KEYS}", ['If-Range: "x"', "Range: bytes=0-3"], 200),
    "TRACE": (f"TRACE {KEYS}", [], 405),
    "TRACE with a body": (f"TRACE {KEYS}", [LENGTH], 405),
    "CONNECT": ("CONNECT example.com:443", [], 404),
    "CONNECT to a path": (f"CONNECT {KEYS}", [], 404),
    "an unknown method": (f"BREW {KEYS}", [], 400),
    "a hundred headers": (f"GET {KEYS}", numbered(100), 200),
    "two thousand headers": (f"GET {KEYS}", numbered(2_000), 431),
    "twenty thousand headers": (f"GET {KEYS}", numbered(20_000), 431),
    "a parameter twice": (f"GET {KEYS}?limit=1&limit=2", [], 400),
    "a parameter twice with one value": (f"GET {KEYS}?limit=1&limit=1", [], 400),
    "a parameter twice, once escaped": (f"GET {KEYS}?limit=1&%6cimit=2", [], 400),
    "a target that is too long": (f"GET {KEYS}?x={'y' * 9_000}", [], 431),
    "another host": (f"GET {KEYS}", ["Host: y"], 400),
    "two credentials": (f"GET {KEYS}", ["Authorization: Bearer other", "Authorization: Bearer another"], 400),
    "two content types": (f"POST {KEYS}", [JSON, "Content-Type: text/plain", LENGTH], 400),
    "two content types, JSON last": (f"POST {KEYS}", ["Content-Type: text/plain", JSON, LENGTH], 400),
    "a list of content types": (f"POST {KEYS}", [f"{JSON}, text/plain", LENGTH], 415),
    "UTF-16": (f"POST {KEYS}", [f"{JSON}; charset=utf-16", LENGTH], 415),
    "UTF-8": (f"POST {KEYS}", [f'{JSON}; charset="UTF-8"', LENGTH], 201),
    "a length with an underscore": (f"POST {KEYS}", [JSON, f"Content-Length: {len(BODY) // 10}_{len(BODY) % 10}"], 400),
    "a length with a sign": (f"POST {KEYS}", [JSON, f"Content-Length: +{len(BODY)}"], 400),
    "a length twice": (f"POST {KEYS}", [JSON, LENGTH, LENGTH], 400),
    "two codings": (f"POST {KEYS}", [JSON, LENGTH, "Content-Encoding: gzip", "Content-Encoding: identity"], 400),
}


async def test_an_edge_of_http_has_one_answer_through_the_gateway_and_at_the_service(ends: Mapping[str, str]) -> None:
    found, expected = {}, {}
    for case, (line, headers, status) in EDGES.items():
        for end, (url, credential) in zip(("gateway", "service"), ends.items(), strict=True):
            head = [f"{line} HTTP/1.1", "Host: x", credential, *headers, "Connection: close", "", ""]
            has_body = any(header.startswith("Content-Length") for header in headers)
            sent = "\r\n".join(head).encode() + (BODY if has_body else b"")
            expected[case, end], found[case, end] = [status], await asyncio.to_thread(_statuses, url, sent)
    assert found == expected


async def test_chunks_of_http_1_0_are_refused_and_nothing_after_them_is_read(ends: Mapping[str, str]) -> None:
    """RFC 9112 section 6.1."""
    for url, credential in ends.items():
        next_request = f"GET {KEYS} HTTP/1.1\r\nHost: x\r\n{credential}\r\n\r\n".encode()
        head = f"POST {KEYS} HTTP/1.0\r\n{credential}\r\n{JSON}\r\nConnection: keep-alive\r\n"
        chunks = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
        assert await asyncio.to_thread(_statuses, url, head.encode() + chunks + next_request) == [400], url


def _statuses(url: str, sent: bytes) -> list[int]:
    """Of all responses until the connection ends; it may be reset before everything is sent."""
    host, port = url.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        with suppress(ConnectionError):
            connection.sendall(sent)
        with suppress(ConnectionError):
            while chunk := connection.recv(65_536):
                received += chunk
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", received)]
