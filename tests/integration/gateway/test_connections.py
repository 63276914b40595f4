"""Kept-alive connections against a server that behaves exactly as badly as the test wants."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from multidict import CIMultiDict

from libs.runtime.child_process import free_port
from services.gateway.connections import Body, BrokenOff, Connections, NotConnected, Sent

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

Behave = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """Reads requests up to their heads' ends and lets ``behave`` answer."""

    def __init__(self) -> None:
        self.connections = 0
        self.heads: list[bytes] = []
        self.behave: Behave = self._answer
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                await self.behave(head, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    @staticmethod
    async def _answer(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    found = Server()
    listening = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    found.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    yield found
    listening.close()


@pytest.fixture
async def connections(server: Server) -> AsyncIterator[Connections]:
    found = Connections(server.url)
    yield found
    found.close()


async def test_a_connection_is_used_again(server: Server, connections: Connections) -> None:
    for _ in range(5):
        assert await _exchange(connections) == b"ok"
    assert server.connections == 1


async def test_concurrent_requests_have_connections_of_their_own(server: Server, connections: Connections) -> None:
    both = asyncio.Barrier(2)

    async def together(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await both.wait()
        writer.write(OK)

    server.behave = together
    assert set(await asyncio.gather(_exchange(connections), _exchange(connections))) == {b"ok"}
    assert server.connections == 2


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
async def test_a_kept_connection_that_just_ended_is_replaced_for_what_may_be_repeated(
    server: Server, connections: Connections, method: str
) -> None:
    await _exchange(connections)
    server.behave = _end_once(server)
    assert await _exchange(connections, method) == b"ok"
    assert server.connections == 2


async def test_a_post_is_never_sent_twice(server: Server, connections: Connections) -> None:
    await _exchange(connections)
    server.behave = _end_once(server)
    with pytest.raises(BrokenOff):
        await _exchange(connections, "POST", b"{}")
    assert len(server.heads) == 2


async def test_a_new_connection_that_ends_without_an_answer_is_not_tried_for_ever(
    server: Server, connections: Connections
) -> None:
    async def end(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    server.behave = end
    with pytest.raises(BrokenOff):
        await _exchange(connections)
    assert server.connections == 1


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n", b"ok"),
        (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK, b"ok"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b""),
    ],
)
async def test_every_way_to_frame_an_answer_is_read(
    server: Server, connections: Connections, answer: bytes, body: bytes
) -> None:
    async def say(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    server.behave = say
    for _ in range(2):
        assert await _exchange(connections) == body
    assert server.connections == (2 if b"close" in answer else 1)


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Le",
    ],
)
async def test_an_answer_that_is_cut_or_no_http_is_broken_off(
    server: Server, connections: Connections, answer: bytes
) -> None:
    async def say(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()
        raise ConnectionResetError

    server.behave = say
    with pytest.raises(BrokenOff):
        await _exchange(connections)


async def test_an_answer_that_was_not_read_to_its_end_costs_its_connection(
    server: Server, connections: Connections
) -> None:
    async def say(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nbegun")

    server.behave = say
    (await connections.exchange(_request())).close()
    server.behave = server._answer
    assert await _exchange(connections) == b"ok"
    assert server.connections == 2


async def test_an_answer_before_the_end_of_the_body_is_read(server: Server, connections: Connections) -> None:
    never = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"begun"
        await never.wait()

    async with await connections.exchange(_request("POST", body())) as exchange:
        assert await exchange.whole() == b"ok"
    assert await _exchange(connections) == b"ok"
    assert server.connections == 2


async def test_a_body_that_fails_ends_the_request_with_its_error(server: Server, connections: Connections) -> None:
    async def wait(_: bytes, reader: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        await reader.read()

    async def body() -> AsyncIterator[bytes]:
        yield b"begun"
        raise LookupError("the caller is gone")

    server.behave = wait
    with pytest.raises(LookupError):
        await connections.exchange(_request("POST", body()))


async def test_bodies_are_framed_by_their_length_or_in_chunks(server: Server, connections: Connections) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"ab"

    async def drain(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if b"chunked" in head:
            await reader.readuntil(b"0\r\n\r\n")
        elif b"Content-Length: 2" in head:
            await reader.readexactly(2)
        writer.write(OK)

    server.behave = drain
    for content, announced, framing in (
        (None, None, b"Content-Length: 0"),
        (b"ab", None, b"Content-Length: 2"),
        (body(), 2, b"Content-Length: 2"),
        (body(), None, b"Transfer-Encoding: chunked"),
    ):
        async with await connections.exchange(Sent("POST", "/", CIMultiDict(), content, announced)) as exchange:
            assert await exchange.whole() == b"ok"
        assert framing in server.heads[-1]
    assert await _exchange(connections) == b"ok"
    assert b"Content-Length" not in server.heads[-1]


async def test_nobody_listening_is_not_connected() -> None:
    connections = Connections(f"http://127.0.0.1:{free_port()}")
    for _ in range(3):
        with pytest.raises(NotConnected):
            await _exchange(connections)


async def test_a_request_that_is_given_up_leaves_nothing_behind(server: Server, connections: Connections) -> None:
    async def hang(_: bytes, reader: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        await reader.read()

    server.behave = hang
    for _ in range(300):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await _exchange(connections)
    server.behave = server._answer
    assert await _exchange(connections) == b"ok"


def _end_once(server: Server) -> Behave:
    async def end(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.behave = server._answer
        writer.transport.abort()
        raise ConnectionResetError

    return end


def _request(method: str = "GET", body: Body = None) -> Sent:
    return Sent(method, "/path?query", CIMultiDict({"Host": "x"}), body)


async def _exchange(connections: Connections, method: str = "GET", body: Body = None) -> bytes:
    async with await connections.exchange(_request(method, body)) as exchange:
        return await exchange.whole()
