"""The internal routes: connection tests and stream discovery, each with a timeout."""

import asyncio
from collections.abc import Sequence

from aiohttp import web

from libs.connectors import registry
from libs.connectors.protocol import Destination, Source
from libs.contracts.internal import (
    CHECK_CONNECTION,
    DISCOVER_STREAMS,
    CheckResult,
    ConnectorConfig,
    DiscoveredStreams,
    LogLine,
)
from libs.core.clock import Clock
from libs.core.errors import DataSyncError, UpstreamTimeout
from libs.core.json import dump_json
from libs.web.internal import internal_route
from services.worker.config import WorkerSettings


class ConnectorHttp:
    def __init__(self, settings: WorkerSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock

    def routes(self) -> Sequence[web.AbstractRouteDef]:
        return [internal_route(CHECK_CONNECTION, self.check), internal_route(DISCOVER_STREAMS, self.discover)]

    async def check(self, wanted: ConnectorConfig) -> CheckResult:
        """Test a connection; a failed test is an answer, not an error."""
        lines = [LogLine(time=self._clock.now(), level="info", message=f"Testing the {wanted.role} {wanted.type}")]
        limit_seconds = self._settings.worker_check_seconds
        try:
            async with asyncio.timeout(limit_seconds):
                warnings = await self._open(wanted).check()
        except TimeoutError:
            succeeded, message = False, f"the {wanted.role} did not answer within {limit_seconds:g} s"
        except DataSyncError as error:
            succeeded, message = False, error.message
        else:
            succeeded, message = True, ", but ".join(["Connection succeeded", *warnings])
            lines += [LogLine(time=self._clock.now(), level="warning", message=warning) for warning in warnings]
        level = "info" if succeeded else "error"
        lines.append(LogLine.model_validate({"time": self._clock.now(), "level": level, "message": message}))
        return CheckResult(succeeded=succeeded, message=message, log_lines=tuple(lines))

    async def discover(self, wanted: ConnectorConfig) -> DiscoveredStreams:
        """List a source's streams. Raises what the source raises, or ``UpstreamTimeout``."""
        limit_seconds = self._settings.worker_discover_seconds
        try:
            async with asyncio.timeout(limit_seconds):
                found = await registry.open_source(wanted.type, wanted.config).discover()
        except TimeoutError:
            raise UpstreamTimeout(f"the source's streams were not listed within {limit_seconds:g} s") from None
        return DiscoveredStreams(streams_json=dump_json(found))

    def _open(self, wanted: ConnectorConfig) -> Source | Destination:
        if wanted.role == "source":
            return registry.open_source(wanted.type, wanted.config)
        return registry.open_destination(wanted.type, wanted.config, parquet_roots=self._settings.parquet_roots)
