"""The addresses of one service: what its name resolves to, without those that have just failed.

A name may have several addresses: a headless Service of Kubernetes, the instances of a service of Compose. New
connections take them in turn. An address that failed is ejected, for a time that doubles with each further failure.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence

Address = tuple[str, int]
Resolve = Callable[[str, int], Awaitable[Sequence[Address]]]

REFRESH_SECONDS = 5.0
EJECTED_SECONDS_MIN = 1.0
EJECTED_SECONDS_MAX = 30.0


async def resolved(host: str, port: int) -> Sequence[Address]:
    """The addresses of a name as the system knows them; raises ``OSError``."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys((str(address[0]), int(address[1])) for *_, address in found))


class Endpoints:
    """Which address the next connection goes to.

    Args:
        clock: monotonic seconds.
        resolve: looks a name up.
    """

    def __init__(self, host: str, port: int, clock: Callable[[], float], resolve: Resolve = resolved) -> None:
        self._host = host
        self._port = port
        self._clock = clock
        self._resolve = resolve
        self._addresses: Sequence[Address] = ()
        self._resolved_at = float("-inf")
        self._refreshing = asyncio.Lock()
        self._turn = 0
        self._failures: dict[Address, int] = {}
        self._ejected_until: dict[Address, float] = {}

    async def in_order(self) -> Sequence[Address]:
        """All addresses, in the order in which they should be tried; ejected ones last, the next to return first.

        Raises:
            OSError: the name can't be resolved, and never could.
        """
        now = self._clock()
        if now - self._resolved_at >= REFRESH_SECONDS:
            async with self._refreshing:
                if now - self._resolved_at >= REFRESH_SECONDS:
                    await self._refresh(now)
        self._turn += 1
        start = self._turn % len(self._addresses)
        turned = [*self._addresses[start:], *self._addresses[:start]]
        return sorted(turned, key=lambda address: max(self._ejected_until.get(address, now), now))

    def is_only(self, address: Address) -> bool:
        """Whether the service has no other address."""
        return all(known == address for known in self._addresses)

    def failed(self, address: Address) -> None:
        """Eject an address that accepts no connections or does not answer, and look the name up again soon."""
        self._failures[address] = failures = self._failures.get(address, 0) + 1
        seconds = min(EJECTED_SECONDS_MAX, EJECTED_SECONDS_MIN * 2 ** (failures - 1))
        self._ejected_until[address] = self._clock() + seconds
        self._resolved_at = float("-inf")

    def answered(self, address: Address) -> None:
        """The address works."""
        if address in self._failures:
            del self._failures[address], self._ejected_until[address]

    async def _refresh(self, now: float) -> None:
        try:
            found = await self._resolve(self._host, self._port)
        except OSError:
            # A name server that is away changes nothing about where the service is.
            if not self._addresses:
                raise
            found = self._addresses
        self._addresses = found
        self._resolved_at = now
        for gone in self._failures.keys() - set(found):
            del self._failures[gone], self._ejected_until[gone]
