"""The request's body on its way to the service: read before it is sent if it is small, streamed otherwise."""

from collections.abc import AsyncIterator

from aiohttp import web

from libs.core.errors import DataSyncError
from libs.web.body import BODY, EXPECTATION, pieces, read_coded, too_large

BUFFERED_BYTES_MAX = 64 * 1024


class RequestBody:
    """Passed on as it is coded: the service that reads it applies its limit, and nothing is decompressed here.

    Attributes:
        is_awaited: the client sends it only after 100 Continue, which the service decides.
        is_coming: it is being streamed, and its end has not come.
        announced_bytes: its announced length.
        refusal: why streaming it ended early.
    """

    def __init__(self, request: web.Request, size_bytes_max: int) -> None:
        self._request = request
        self._size_bytes_max = size_bytes_max
        self.is_awaited = EXPECTATION in request and request.body_exists
        self.is_coming = False
        self.announced_bytes: int | None = None
        self.refusal: DataSyncError | None = None

    async def start(self) -> bytes | AsyncIterator[bytes] | None:
        """The body, or its pieces; raises as ``libs.web.body.pieces``."""
        request = self._request
        known: bytes | None = request.get(BODY)
        if known is not None or not request.body_exists:
            return known
        self.announced_bytes = request.content_length
        if self.announced_bytes is not None and self.announced_bytes > self._size_bytes_max:
            raise too_large(self._size_bytes_max)
        if self.is_awaited or self.announced_bytes is None or self.announced_bytes > BUFFERED_BYTES_MAX:
            return self._pieces()
        return await read_coded(request, self._size_bytes_max)

    async def _pieces(self) -> AsyncIterator[bytes]:
        self.is_coming = True
        try:
            async for piece in pieces(self._request, self._size_bytes_max):
                yield piece
        except DataSyncError as error:
            self.refusal = error
            raise
        self.is_coming = False
