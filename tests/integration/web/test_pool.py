"""The connection pool against a server that misbehaves as each test tells it to."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from multidict import CIMultiDict

from libs.suite.child_process import free_port
from libs.testing.waiting import until
from libs.web.upstream.exchange import ResponseTimeout
from libs.web.upstream.pool import CONNECTIONS_MAX, HEAD_TIMEOUT_SECONDS, ConnectFailed, ConnectionPool
from libs.web.upstream.wire import Body, ResponseBroken, UpstreamRequest

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

Behave = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def answer_ok(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(OK)


class Server:
    """Reads the heads of requests and lets ``behave`` answer them."""

    def __init__(self) -> None:
        self.connections = 0
        self.heads: list[bytes] = []
        self.behave: Behave = answer_ok
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


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    found = Server()
    listening = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    found.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    yield found
    listening.close()


@pytest.fixture
async def pool(server: Server) -> AsyncIterator[ConnectionPool]:
    found = ConnectionPool(server.url)
    yield found
    found.close()


async def test_a_connection_is_used_again(server: Server, pool: ConnectionPool) -> None:
    for _ in range(5):
        assert await _exchange(pool) == b"ok"
    assert server.connections == 1


async def test_concurrent_requests_have_connections_of_their_own(server: Server, pool: ConnectionPool) -> None:
    both = asyncio.Barrier(2)

    async def together(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await both.wait()
        writer.write(OK)

    server.behave = together
    assert set(await asyncio.gather(_exchange(pool), _exchange(pool))) == {b"ok"}
    assert server.connections == 2


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
async def test_a_safe_request_is_sent_again_if_its_kept_connection_ends(
    server: Server, pool: ConnectionPool, method: str
) -> None:
    await _exchange(pool)
    server.behave = _end_once(server)
    assert await _exchange(pool, method) == (b"" if method == "HEAD" else b"ok")
    assert server.connections == 2


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
async def test_a_request_that_may_change_something_is_never_sent_twice(
    server: Server, pool: ConnectionPool, method: str
) -> None:
    await _exchange(pool)
    server.behave = _end_once(server)
    with pytest.raises(ResponseBroken):
        await _exchange(pool, method, b"{}")
    assert len(server.heads) == 2


async def test_a_safe_request_is_sent_twice_at_most_however_many_connections_are_kept(
    server: Server, pool: ConnectionPool
) -> None:
    both = asyncio.Barrier(3)

    async def together(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await both.wait()
        writer.write(OK)

    server.behave = together
    await asyncio.gather(*(_exchange(pool) for _ in range(3)))
    server.behave = _end
    with pytest.raises(ResponseBroken):
        await _exchange(pool)
    assert (server.connections, len(server.heads)) == (4, 5)


async def test_a_safe_request_is_sent_again_if_its_new_connection_ends_unanswered(
    server: Server, pool: ConnectionPool
) -> None:
    server.behave = _end_once(server)
    assert await _exchange(pool) == b"ok"
    assert (server.connections, len(server.heads)) == (2, 2)


async def test_nothing_is_sent_again_once_a_response_has_begun(server: Server, pool: ConnectionPool) -> None:
    async def begin(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200")
        await writer.drain()
        raise ConnectionResetError

    await _exchange(pool)
    server.behave = begin
    with pytest.raises(ResponseBroken):
        await _exchange(pool)
    assert len(server.heads) == 2


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_kept_connection_that_ended_before_its_use_is_not_used(
    server: Server, pool: ConnectionPool, method: str
) -> None:
    """Not a byte of the next request is written to it."""
    ended = asyncio.Event()

    async def answer_and_end(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        writer.close()
        await writer.wait_closed()
        ended.set()

    server.behave = answer_and_end
    assert await _exchange(pool, method) == b"ok"
    server.behave = answer_ok
    await ended.wait()
    assert await _exchange(pool, method) == b"ok"
    assert len(server.heads) == 2


async def test_a_safe_request_whose_connections_end_unanswered_is_sent_twice_at_most(
    server: Server, pool: ConnectionPool
) -> None:
    server.behave = _end
    with pytest.raises(ResponseBroken):
        await _exchange(pool)
    assert server.connections == 2


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n", b"ok"),
        (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK, b"ok"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + OK, b"ok"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 2\r\n\r\n", b""),
        (b"HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n", b""),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n2;a=b\r\nok\r\n0\r\nX-Trailer: 1\r\n\r\n", b"ok"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b""),
    ],
)
async def test_every_framing_of_a_response_is_read(
    server: Server, pool: ConnectionPool, answer: bytes, body: bytes
) -> None:
    async def respond(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    server.behave = respond
    for _ in range(2):
        assert await _exchange(pool) == body
    assert server.connections == (2 if b"close" in answer else 1)


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding : chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX-Folded: a\r\n b\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"x" * 400_000,
        b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 70_000,
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n",
        b"\r\n\r\n" + OK,
    ],
)
async def test_a_response_that_is_cut_or_not_http_is_broken(
    server: Server, pool: ConnectionPool, answer: bytes
) -> None:
    async def respond(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()
        raise ConnectionResetError

    server.behave = respond
    with pytest.raises(ResponseBroken):
        await _exchange(pool)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "answer",
    [
        OK + b"\n",
        OK + OK,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n" + OK,
        b"HTTP/1.1 200 OK\r\nConnection: Close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nConnection: x, close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 204 No Content\r\n\r\n" + OK,
    ],
)
async def test_a_connection_on_which_something_may_be_left_is_not_used_again(
    server: Server, pool: ConnectionPool, answer: bytes, method: str
) -> None:
    async def respond(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    server.behave = respond
    for expected in range(1, 4):
        async with await pool.exchange(_request(method)) as exchange:
            body = await exchange.whole()
        assert body == (b"ok" if b" 200 " in answer[:13] and method == "GET" else b"")
        assert server.connections == expected


async def test_bytes_that_arrive_while_a_connection_is_idle_end_it(server: Server, pool: ConnectionPool) -> None:
    late, written = asyncio.Event(), asyncio.Event()

    async def respond(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        await late.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison")
        await writer.drain()
        written.set()

    server.behave = respond
    assert await _exchange(pool) == b"ok"
    late.set()
    await written.wait()
    server.behave = answer_ok
    assert await _exchange(pool) == b"ok"
    assert server.connections == 2


async def test_a_response_that_arrives_byte_by_byte_is_the_same_response(server: Server, pool: ConnectionPool) -> None:
    answers = [
        OK,
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX: y\r\n\r\n",
    ]

    async def drip(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for byte in answers[-1]:
            writer.write(bytes((byte,)))
            await writer.drain()
            await asyncio.sleep(0)

    server.behave = drip
    while answers:
        assert await _exchange(pool) == b"ok"
        answers.pop()
    assert server.connections == 1


async def test_a_response_without_a_length_ends_with_its_connection(server: Server, pool: ConnectionPool) -> None:
    async def respond(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nwhatever")
        await writer.drain()
        raise ConnectionError

    server.behave = respond
    for expected in (1, 2):
        assert await _exchange(pool) == b"whatever"
        assert server.connections == expected


async def test_a_connection_whose_caller_is_gone_is_not_used_again(server: Server, pool: ConnectionPool) -> None:
    request = _request()
    request.caller_is_there = lambda: False
    async with await pool.exchange(request) as exchange:
        assert await exchange.whole() == b"ok"
    assert await _exchange(pool) == b"ok"
    assert server.connections == 2


async def test_a_response_that_does_not_begin_in_time_times_out(server: Server, pool: ConnectionPool) -> None:
    async def hang(_: bytes, reader: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        await reader.read()

    server.behave = hang
    with pytest.raises(ResponseTimeout):
        await pool.exchange(_request(), timeout_seconds=0.01)


async def test_a_request_that_gets_no_connection_in_time_times_out(server: Server, pool: ConnectionPool) -> None:
    held = [await pool.exchange(_request()) for _ in range(CONNECTIONS_MAX)]
    with pytest.raises(ResponseTimeout):
        await pool.exchange(_request(), timeout_seconds=0.01)
    waiting = asyncio.ensure_future(_exchange(pool))
    held.pop().close()
    assert await waiting == b"ok"
    for exchange in held:
        exchange.close()
    assert server.connections <= CONNECTIONS_MAX + 1


@pytest.mark.parametrize("line", ["a\r\nX-Smuggled: 1", "a\nb", "a\rb", "a\0b"])
async def test_a_line_break_in_a_header_is_never_sent(server: Server, pool: ConnectionPool, line: str) -> None:
    request = _request()
    request.headers["X-Value"] = line
    with pytest.raises(ValueError, match="line break"):
        await pool.exchange(request)
    assert server.heads == []


async def test_a_body_of_another_length_than_announced_fails(server: Server, pool: ConnectionPool) -> None:
    async def drain(_: bytes, reader: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        await reader.read()

    async def body() -> AsyncIterator[bytes]:
        yield b"abc"

    server.behave = drain
    for announced in (2, 4):
        with pytest.raises(ResponseBroken):
            await pool.exchange(UpstreamRequest("POST", "/", CIMultiDict(), body(), announced))


async def test_an_empty_piece_does_not_end_a_chunked_body(server: Server, pool: ConnectionPool) -> None:
    seen: list[bytes] = []

    async def body() -> AsyncIterator[bytes]:
        yield b"a"
        yield b""
        yield b"b"

    async def drain(_: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n0\r\n\r\n"))
        writer.write(OK)

    server.behave = drain
    assert await _exchange(pool, "POST", body()) == b"ok"
    assert seen == [b"1\r\na\r\n1\r\nb\r\n0\r\n\r\n"]


async def test_a_connection_whose_response_was_not_read_to_its_end_is_not_used_again(
    server: Server, pool: ConnectionPool
) -> None:
    async def respond(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nbegun")

    server.behave = respond
    (await pool.exchange(_request())).close()
    server.behave = answer_ok
    assert await _exchange(pool) == b"ok"
    assert server.connections == 2


async def test_a_response_before_the_end_of_the_request_body_is_read(server: Server, pool: ConnectionPool) -> None:
    never = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"begun"
        await never.wait()

    async with await pool.exchange(_request("POST", body())) as exchange:
        assert await exchange.whole() == b"ok"
    assert await _exchange(pool) == b"ok"
    assert server.connections == 2


async def test_a_body_that_fails_ends_the_request_with_its_error(server: Server, pool: ConnectionPool) -> None:
    async def wait(_: bytes, reader: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        await reader.read()

    async def body() -> AsyncIterator[bytes]:
        yield b"begun"
        raise LookupError("the caller is gone")

    server.behave = wait
    with pytest.raises(LookupError):
        await pool.exchange(_request("POST", body()))


async def test_bodies_are_framed_by_their_length_or_in_chunks(server: Server, pool: ConnectionPool) -> None:
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
        async with await pool.exchange(UpstreamRequest("POST", "/", CIMultiDict(), content, announced)) as exchange:
            assert await exchange.whole() == b"ok"
        assert framing in server.heads[-1]
    assert await _exchange(pool) == b"ok"
    assert b"Content-Length" not in server.heads[-1]


async def test_connecting_fails_if_nobody_listens() -> None:
    pool = ConnectionPool(f"http://127.0.0.1:{free_port()}")
    for _ in range(3):
        with pytest.raises(ConnectFailed):
            await _exchange(pool)


async def test_requests_that_are_cancelled_release_their_connections(server: Server, pool: ConnectionPool) -> None:
    async def hang(_: bytes, reader: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        await reader.read()

    server.behave = hang
    for _ in range(300):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await _exchange(pool)
    server.behave = answer_ok
    assert await _exchange(pool) == b"ok"


async def _end(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


def _end_once(server: Server) -> Behave:
    async def end(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.behave = answer_ok
        writer.transport.abort()
        raise ConnectionResetError

    return end


def _request(method: str = "GET", body: Body = None) -> UpstreamRequest:
    return UpstreamRequest(method, "/path?query", CIMultiDict({"Host": "x"}), body)


async def _exchange(
    pool: ConnectionPool, method: str = "GET", body: Body = None, timeout_seconds: float = HEAD_TIMEOUT_SECONDS
) -> bytes:
    async with await pool.exchange(_request(method, body), timeout_seconds) as exchange:
        return await exchange.whole()


@pytest.fixture
async def instances() -> AsyncIterator[list[Server]]:
    """Two instances of one service."""
    found = [Server(), Server()]
    listening = [await asyncio.start_server(one.serve, "127.0.0.1", 0) for one in found]
    for one, its in zip(found, listening, strict=True):
        one.url = f"http://127.0.0.1:{its.sockets[0].getsockname()[1]}"
    yield found
    for its in listening:
        its.close()


def pool_of(*ports: int) -> ConnectionPool:
    """A pool whose service's name has these addresses."""

    async def resolve(_: str, __: int) -> list[tuple[str, int]]:
        return [("127.0.0.1", port) for port in ports]

    return ConnectionPool("http://service.example", resolve=resolve)


async def test_connections_are_spread_over_the_addresses_of_a_name(instances: list[Server]) -> None:
    pool = pool_of(*(port_of(one) for one in instances))
    together = asyncio.Barrier(4)

    async def wait_for_all(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await together.wait()
        writer.write(OK)

    for one in instances:
        one.behave = wait_for_all
    await asyncio.gather(*(_exchange(pool) for _ in range(4)))
    assert [one.connections for one in instances] == [2, 2]
    pool.close()


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_an_address_that_accepts_no_connections_is_passed_over(server: Server, method: str) -> None:
    pool = pool_of(free_port(), port_of(server))
    for _ in range(3):
        assert await _exchange(pool, method) == b"ok"
    pool.close()


async def be_silent(_: bytes, reader: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
    await reader.read()


async def test_requests_take_the_addresses_in_turn_over_kept_connections(instances: list[Server]) -> None:
    pool = pool_of(*(port_of(one) for one in instances))
    for _ in range(10):
        await _exchange(pool)
    assert [(len(one.heads), one.connections) for one in instances] == [(5, 1), (5, 1)]
    pool.close()


async def test_an_instance_that_is_silent_costs_no_read_and_gets_no_more_requests(
    instances: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("libs.web.upstream.pool.FIRST_ATTEMPT_SECONDS", 0.2)
    silent, other = instances
    pool = pool_of(*(port_of(one) for one in instances))
    silent.behave = be_silent
    for _ in range(6):
        assert await _exchange(pool) == b"ok"
    assert len(silent.heads) == 1
    assert len(other.heads) == 6
    pool.close()


async def test_a_request_that_is_slow_everywhere_ejects_nobody(
    instances: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("libs.web.upstream.pool.FIRST_ATTEMPT_SECONDS", 0.1)
    pool = pool_of(*(port_of(one) for one in instances))
    for one in instances:
        one.behave = be_silent
    with pytest.raises(ResponseTimeout):
        await _exchange(pool, timeout_seconds=0.3)
    assert [len(one.heads) for one in instances] == [1, 1]
    pool.close()


async def test_what_may_change_something_waits_for_its_instance(
    instances: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("libs.web.upstream.pool.FIRST_ATTEMPT_SECONDS", 0.05)
    pool = pool_of(*(port_of(one) for one in instances))
    for one in instances:
        one.behave = be_silent
    with pytest.raises(ResponseTimeout):
        await _exchange(pool, "POST", timeout_seconds=0.2)
    assert sum(len(one.heads) for one in instances) == 1
    pool.close()


async def test_a_broken_request_is_sent_again_to_another_instance(instances: list[Server]) -> None:
    broken, other = instances
    broken.behave = _end
    pool = pool_of(*(port_of(one) for one in instances))
    for _ in range(4):
        assert await _exchange(pool) == b"ok"
    assert len(other.heads) == 4
    pool.close()


async def test_addresses_that_are_gone_get_nothing_and_new_ones_their_share(
    instances: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("libs.web.upstream.endpoints.REFRESH_SECONDS", 0.0)
    ports = [port_of(instances[0])]

    async def resolve(_: str, __: int) -> list[tuple[str, int]]:
        return [("127.0.0.1", port) for port in ports]

    pool = ConnectionPool("http://service.example", resolve=resolve)
    await _exchange(pool)
    ports.append(port_of(instances[1]))

    async def both_are_used() -> bool:
        await _exchange(pool)
        return all(one.heads for one in instances)

    await until(both_are_used)
    del ports[0]

    async def only_the_new_one_is_used() -> bool:
        before = len(instances[0].heads)
        for _ in range(4):
            await _exchange(pool)
        return len(instances[0].heads) == before

    await until(only_the_new_one_is_used)
    pool.close()


async def test_several_urls_are_several_instances(instances: list[Server]) -> None:
    pool = ConnectionPool(",".join(one.url for one in instances))
    for _ in range(4):
        await _exchange(pool)
    assert [len(one.heads) for one in instances] == [2, 2]
    pool.close()


def port_of(server: Server) -> int:
    return int(server.url.rpartition(":")[2])


async def test_an_upload_that_stalls_does_not_eject_the_address(instances: list[Server]) -> None:
    pool = pool_of(*(port_of(one) for one in instances))

    async def answer_and_close(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n"))

    async def stalled() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    for one in instances:
        one.behave = be_silent
    for _ in instances:
        with pytest.raises(ResponseTimeout):
            await _exchange(pool, "POST", stalled(), timeout_seconds=0.1)
    for one in instances:
        one.behave, one.connections = answer_and_close, 0
    for _ in range(4):
        assert await _exchange(pool) == b"ok"
    assert [one.connections for one in instances] == [2, 2]
    pool.close()
