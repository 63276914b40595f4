"""Calls from one service to another: signed, with a timeout, over pooled connections to all of its addresses."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import orjson
from aiohttp import web
from multidict import CIMultiDict
from pydantic import ValidationError

from libs.contracts.internal import InternalCall
from libs.core.envelope import Frozen
from libs.core.errors import CallOperator, Forbidden, RetryLater, UpstreamTimeout
from libs.process.settings import ServiceSettings
from libs.process.telemetry import INTERNAL_CALLS, client_span, inject_trace
from libs.web.body import read_bytes
from libs.web.errors import error_of_internal
from libs.web.principals import PRINCIPAL_HEADER, PrincipalSigner
from libs.web.requests import REQUEST_ID, invalid_input, principal_of
from libs.web.upstream.pool import ConnectFailed, ConnectionPool
from libs.web.upstream.wire import ResponseBroken, UpstreamRequest

RETRY_DELAY_SECONDS = 0.05

RequestT = TypeVar("RequestT", bound=Frozen)
ResponseT = TypeVar("ResponseT", bound=Frozen)


class InternalClient:
    """Makes the calls of ``libs.contracts.internal`` as one service."""

    def __init__(self, settings: ServiceSettings, signer: PrincipalSigner) -> None:
        self._settings = settings
        self._signer = signer
        self._pools: dict[str, ConnectionPool] = {}
        self._timers: dict[tuple[str, str], Any] = {}

    async def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    async def call(self, call: InternalCall[RequestT, ResponseT], request: RequestT) -> ResponseT:
        """Call another service; the error that it raises is raised here.

        Raises:
            RetryLater: the service can't be reached.
            UpstreamTimeout: it did not answer within the call's time.
            DataSyncError: the error that the called service raised.
        """
        started_at = time.perf_counter()
        outcome = "failed"
        try:
            with client_span(f"{call.service} {call.path}"):
                response = await self._call(call, request)
            outcome = "answered"
            return response
        finally:
            self._timer(call, outcome).observe(time.perf_counter() - started_at)

    async def _call(self, call: InternalCall[RequestT, ResponseT], request: RequestT) -> ResponseT:
        try:
            async with asyncio.timeout(call.timeout_seconds):
                status, body = await self._send_twice(call, request.model_dump_json().encode())
        except TimeoutError:
            raise UpstreamTimeout(
                f"{call.service} did not answer within {call.timeout_seconds:g} seconds", code="service_timeout"
            ) from None
        except (ConnectFailed, ResponseBroken) as error:
            raise RetryLater(
                f"{call.service} can't be reached: {type(error).__name__}", code="service_unavailable"
            ) from error
        return _answer(call, status, body)

    async def _send_twice(self, call: InternalCall[Any, Any], body: bytes) -> tuple[int, bytes]:
        """Retry once if no instance accepted a connection; the pool repeats calls whose connection broke."""
        try:
            return await self._send(call, body)
        except ConnectFailed:
            await asyncio.sleep(RETRY_DELAY_SECONDS)
            return await self._send(call, body)

    async def _send(self, call: InternalCall[Any, Any], body: bytes) -> tuple[int, bytes]:
        pool = self._pool(call.service)
        headers = CIMultiDict(
            {
                "Host": pool.host,
                PRINCIPAL_HEADER: self._signer.sign_as_service(call.service),
                "Content-Type": "application/json",
            }
        )
        if request_id := REQUEST_ID.get():
            headers["X-Request-Id"] = request_id
        inject_trace(headers)
        request = UpstreamRequest("POST", call.path, headers, body, may_repeat=call.is_repeatable)
        return await pool.fetch(request)

    def _pool(self, service: str) -> ConnectionPool:
        if service not in self._pools:
            self._pools[service] = ConnectionPool(self._settings.urls_of(service))
        return self._pools[service]

    def _timer(self, call: InternalCall[Any, Any], outcome: str) -> Any:
        timer = self._timers.get((call.path, outcome))
        if timer is None:
            timer = self._timers[call.path, outcome] = INTERNAL_CALLS.labels(call.service, call.path, outcome)
        return timer


def _answer(call: InternalCall[Any, ResponseT], status: int, body: bytes) -> ResponseT:
    if status == 200:
        try:
            return call.response.model_validate_json(body, extra="ignore")
        except ValidationError as error:
            raise CallOperator(
                f"{call.service} answered {call.path} with an unexpected model: {error.error_count()} errors"
            ) from None
    try:
        told = orjson.loads(body)
    except orjson.JSONDecodeError:
        told = {}
    raise error_of_internal(status, told if isinstance(told, dict) else {})


def internal_route(
    call: InternalCall[RequestT, ResponseT], handler: Callable[[RequestT], Awaitable[ResponseT]]
) -> web.RouteDef:
    """The route that answers an internal call, to the services that may make it."""

    async def answer(request: web.Request) -> web.Response:
        caller = principal_of(request)
        if caller.kind != "service" or caller.subject not in call.callers:
            raise Forbidden(f"{caller.kind} {caller.subject} may not call {call.path}")
        body = await read_bytes(request)
        try:
            model = call.request.model_validate_json(body, extra="ignore")
        except ValidationError as error:
            raise invalid_input(error) from None
        response = await handler(model)
        return web.Response(body=response.model_dump_json().encode(), content_type="application/json")

    return web.post(call.path, answer)
