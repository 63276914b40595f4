"""The API's description: the parts of all services, merged into one document that is cached for five seconds."""

import asyncio
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass

import orjson
import structlog

from libs.web.openapi import Json, merged
from libs.web.operational import DESCRIPTION_PATH
from libs.web.upstream.pool import ConnectionPool
from services.gateway.readiness import NO_ANSWER, fetched

FRESH_SECONDS = 5.0
# A service makes its part when it is first asked for, which takes a second on a busy machine.
FIRST_TIMEOUT_SECONDS = 10.0
TIMEOUT_SECONDS = 1.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Document:
    """OpenAPI 3.1 as JSON text, and its entity tag."""

    text: bytes
    etag: str


class Description:
    """What ``/openapi.json`` answers.

    Args:
        pools: of each service, in the order of the document; one that does not answer is described as before.
        own: the gateway's part.
    """

    def __init__(self, pools: Mapping[str, ConnectionPool], own: Json, version: str) -> None:
        self._pools = pools
        self._own = own
        self._version = version
        self._parts: dict[str, Json] = {}
        self._document: Document | None = None
        self._fresh_until = 0.0
        self._lock = asyncio.Lock()

    async def document(self) -> Document:
        async with self._lock:
            if self._document is None or time.monotonic() > self._fresh_until:
                self._document = await self._written()
                self._fresh_until = time.monotonic() + FRESH_SECONDS
            return self._document

    async def _written(self) -> Document:
        await asyncio.gather(*(self._refresh(service) for service in self._pools))
        known = [self._parts[service] for service in self._pools if service in self._parts]
        text = await asyncio.to_thread(orjson.dumps, merged([*known, self._own], version=self._version))
        return Document(text, f'"{hashlib.sha256(text).hexdigest()[:32]}"')

    async def _refresh(self, service: str) -> None:
        timeout_seconds = TIMEOUT_SECONDS if service in self._parts else FIRST_TIMEOUT_SECONDS
        try:
            status, answer = await fetched(self._pools[service], DESCRIPTION_PATH, timeout_seconds)
            if status == 200:
                self._parts[service] = orjson.loads(answer)
        except (*NO_ANSWER, orjson.JSONDecodeError) as error:
            log.debug("description_unavailable", service=service, error=type(error).__name__)
