"""A load generator that costs little: one prepared HTTP request, sent again on each kept-alive connection."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Load:
    """What came of a round: answers a second, and the latencies' quantiles in milliseconds."""

    per_second: float
    p50_ms: float
    p99_ms: float


async def get(url: str, headers: Mapping[str, str], *, connections: int, seconds: float) -> Load:
    """Send ``GET url`` on so many connections for so long.

    Raises:
        AssertionError: an answer's status was not 200.
    """
    address = urlsplit(url)
    lines = [f"GET {address.path} HTTP/1.1", f"Host: {address.netloc}", *(f"{k}: {v}" for k, v in headers.items())]
    request = ("\r\n".join(lines) + "\r\n\r\n").encode()
    latencies: list[float] = []
    deadline = time.perf_counter() + seconds
    async with asyncio.TaskGroup() as tasks:
        for _ in range(connections):
            tasks.create_task(_connection(address.hostname or "", address.port or 80, request, deadline, latencies))
    latencies.sort()
    return Load(
        len(latencies) / seconds,
        latencies[len(latencies) // 2] * 1000,
        latencies[len(latencies) * 99 // 100] * 1000,
    )


async def _connection(host: str, port: int, request: bytes, deadline: float, latencies: list[float]) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        while (sent := time.perf_counter()) < deadline:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            await reader.readexactly(_length_of(head))
            latencies.append(time.perf_counter() - sent)
    finally:
        writer.close()


def _length_of(head: bytes) -> int:
    start = head.lower().index(b"content-length:") + len(b"content-length:")
    return int(head[start : head.index(b"\r\n", start)])
