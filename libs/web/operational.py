"""What a process reports about itself: health, readiness, metrics, its part of the API's description."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Literal

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler
from typing_extensions import TypedDict

from libs.process.health import Degraded, Health
from libs.process.telemetry import (
    metrics_page,
)
from libs.web import routes
from libs.web.answers import json_response
from libs.web.calls import Call
from libs.web.openapi import Content, Json, part_of

PUBLIC_PATHS = frozenset(
    {"/login", "/signup", "/oauth/token", "/healthz", "/readyz", "/openapi.json", "/docs", "/telemetry-id"}
)
"""Paths that need no credential."""

DESCRIPTION_PATH = "/internal/openapi.json"
"""Where a service shows its part of the API's description; the gateway forwards nothing below ``/internal``."""

OPERATIONAL_PATHS = frozenset({"/healthz", "/readyz", "/metrics", DESCRIPTION_PATH})

log = structlog.get_logger(__name__)


class HealthShown(TypedDict):
    status: Literal["ok"]


class CheckShown(TypedDict):
    ready: bool
    message: str


class ReadinessShown(TypedDict):
    status: Literal["ready", "degraded", "not ready"]
    checks: dict[str, CheckShown]


def operational_routes(health: Health) -> Sequence[web.RouteDef]:
    """Liveness and readiness probes."""
    get = partial(routes.get, tag="Operation", enveloped=False)
    not_ready = Content("Not ready: some check fails, or the process is stopping", ReadinessShown)
    return [
        get("/healthz", _healthz, "Whether the process lives"),
        get(
            "/readyz",
            _readyz_of(health),
            "Whether the process should get requests",
            answer=ReadinessShown,
            also={503: not_ready},
        ),
    ]


async def _healthz(call: Call) -> HealthShown:
    return {"status": "ok"}


def _readyz_of(health: Health) -> routes.CallHandler:
    async def readyz(call: Call) -> web.Response:
        report = await health.report()
        problems = [problem for problem in report.values() if problem is not None]
        is_ready = all(isinstance(problem, Degraded) for problem in problems)
        shown: ReadinessShown = {
            "status": "not ready" if not is_ready else "degraded" if problems else "ready",
            "checks": {name: {"ready": not problem, "message": problem or ""} for name, problem in report.items()},
        }
        return json_response(shown, 200 if is_ready else 503)

    return readyz


def description_of(described: Sequence[web.AbstractRouteDef]) -> Handler:
    """Generated on the first request, so that it does not slow down the start of the service."""
    written: list[Json] = []

    async def description(_: web.Request) -> web.Response:
        if not written:
            written.append(part_of(described, PUBLIC_PATHS))
        return json_response(written[0])

    return description


async def metrics(_: web.Request) -> web.Response:
    """The page that Prometheus scrapes."""
    page = await asyncio.to_thread(metrics_page)
    return web.Response(body=page, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
