"""The HTTP/1.1 server of every service: malformed requests get an error in the API's shape, stalled ones are closed."""

import asyncio
from collections.abc import Callable
from typing import Any

import structlog
from aiohttp import HttpVersion11, web
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong
from aiohttp.http_parser import RawRequestMessage
from aiohttp.web_protocol import RequestHandler
from multidict import CIMultiDict, CIMultiDictProxy

from libs.core.errors import CallOperator, DataSyncError, FixRequest
from libs.core.ids import uuid7
from libs.process.read_budget import HELD
from libs.web.body import EXPECTATION
from libs.web.errors import INTERNAL_MESSAGE, error_answer

HEAD_TIMEOUT_SECONDS = 15.0
IDLE_SECONDS = 75.0
HEADERS_MAX = 128

log = structlog.get_logger(__name__)


class ServiceRunner(web.AppRunner):
    """Runs an application.

    Args:
        is_draining: whether the process is about to stop; then each response closes its connection.
        shutdown_timeout_seconds: how long requests in flight may take to finish when it is cleaned up.
    """

    def __init__(
        self, app: web.Application, *, is_draining: Callable[[], bool], shutdown_timeout_seconds: float
    ) -> None:
        super().__init__(
            app,
            access_log=None,
            shutdown_timeout=shutdown_timeout_seconds,
            keepalive_timeout=IDLE_SECONDS,
            auto_decompress=False,
            max_headers=HEADERS_MAX,
        )
        self._is_draining = is_draining

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        return _Server(
            server.request_handler,
            request_factory=_request_factory(server.request_factory, self._is_draining),
            loop=asyncio.get_running_loop(),
            **server._kwargs,
        )


class _Server(web.Server):
    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(RequestHandler):
    """One client's connection."""

    __slots__ = ("_head_deadline",)

    def __init__(self, manager: web.Server, **kwargs: Any) -> None:
        super().__init__(manager, **kwargs)
        self._head_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        heads = self._request_count
        super().data_received(data)
        if self._request_count > heads:
            if self._head_deadline is not None:
                self._head_deadline.cancel()
                self._head_deadline = None
        elif self._head_deadline is None and not self._request_in_progress and not self._messages:
            self._expect_head()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._head_deadline is not None:
            self._head_deadline.cancel()
        super().connection_lost(exc)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send the answer, then give back the read budget that it holds."""
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            if (held := request.get(HELD)) is not None:
                held.give_back()

    def _expect_head(self) -> None:
        """Close the connection unless a complete request head arrives in time."""
        self._head_deadline = self._loop.call_later(HEAD_TIMEOUT_SECONDS, self.force_close)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer a request that is not valid HTTP, then close the connection."""
        if isinstance(exc, ConnectionError):
            raise exc
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun, so no error can be sent")
        request_id = uuid7()
        answer = error_answer(self._error_of(exc, status, request_id), "project", "", request_id)
        answer.headers["X-Request-Id"] = request_id
        answer.headers["Server"] = "datasync"
        answer.force_close()
        return answer

    def _error_of(self, exc: BaseException | None, status: int, request_id: str) -> DataSyncError:
        if status >= 500:
            log.error("connection_crashed", error=repr(exc), exc_info=exc, request_id=request_id)
            return CallOperator(INTERNAL_MESSAGE)
        if isinstance(exc, LineTooLong):
            return _head_too_large("a line of the request's head is too long")
        if isinstance(exc, BadHttpMessage) and exc.message.startswith("Too many"):
            return _head_too_large(f"the request's head has more than {HEADERS_MAX} lines")
        return FixRequest("the request is not valid HTTP/1.1", code="malformed_request")


def _head_too_large(message: str) -> FixRequest:
    error = FixRequest(message, code="head_too_large")
    error.status = 431
    return error


def _request_factory(
    make: Callable[..., web.BaseRequest], is_draining: Callable[[], bool]
) -> Callable[..., web.BaseRequest]:
    """Makes requests whose 100 Continue waits until the body is read, so that they can be refused before it is sent.

    While the process drains, a request is made as if its client had asked for the connection to be closed.
    """

    def request_of(message: RawRequestMessage, *connection: Any) -> web.BaseRequest:
        if is_draining():
            message = message._replace(should_close=True)
        expectation = message.headers.get("Expect")
        if expectation is None:
            return make(message, *connection)
        headers = CIMultiDict(message.headers)
        del headers["Expect"]
        request = make(message._replace(headers=CIMultiDictProxy(headers)), *connection)
        if message.version >= HttpVersion11:
            request[EXPECTATION] = expectation
        return request

    return request_of
