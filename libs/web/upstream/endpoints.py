"""The addresses of one service: what its names resolve to, without those that have just failed.

A service may have several URLs, and a name several addresses: a headless Service of Kubernetes, the instances of a
service of Compose. Requests take them in turn. An address that failed is ejected, for a time that doubles with each
further failure. Names are looked up again every few seconds, in the background.
"""

import asyncio
import ipaddress
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
    """Which address the next request goes to.

    Args:
        hosts: names or addresses, with their ports.
        clock: monotonic seconds.
        resolve: looks a name up.
    """

    def __init__(self, hosts: Sequence[Address], clock: Callable[[], float], resolve: Resolve = resolved) -> None:
        self._hosts = hosts
        self._clock = clock
        self._resolve = resolve
        # The addresses, each with the host that it was found for.
        self._addresses: dict[Address, str] = {}
        self._resolved_at = float("-inf")
        self._refreshing: asyncio.Task[None] | None = None
        self._turn = 0
        self._failures: dict[Address, int] = {}
        self._ejected_until: dict[Address, float] = {}
        self._is_fixed = all(_is_literal(host) for host, _ in hosts)

    async def in_order(self) -> Sequence[Address]:
        """All addresses, in the order in which they should be tried; ejected ones last, the next to return first.

        Raises:
            OSError: no name can be resolved, and none ever could.
        """
        now = self._clock()
        if now - self._resolved_at >= REFRESH_SECONDS and not (self._is_fixed and self._addresses):
            refreshing = self._refresh()
            if not self._addresses:
                await asyncio.shield(refreshing)
        addresses = list(self._addresses)
        if len(addresses) == 1:
            return addresses
        self._turn += 1
        start = self._turn % len(addresses)
        turned = [*addresses[start:], *addresses[:start]]
        if not self._ejected_until:
            return turned
        return sorted(turned, key=lambda address: max(self._ejected_until.get(address, now), now))

    @property
    def are_several(self) -> bool:
        """Whether the service has more than one address."""
        return len(self._addresses) > 1

    def knows(self, address: Address) -> bool:
        """Whether the address is one of the service's."""
        return address in self._addresses

    def host_of(self, address: Address) -> str:
        """The host that an address was found for."""
        return self._addresses.get(address, address[0])

    def failed(self, address: Address) -> None:
        """Eject an address that accepts no connections or does not answer, and look the names up again soon."""
        self._failures[address] = failures = self._failures.get(address, 0) + 1
        seconds = min(EJECTED_SECONDS_MAX, EJECTED_SECONDS_MIN * 2 ** (failures - 1))
        self._ejected_until[address] = self._clock() + seconds
        self._resolved_at = float("-inf")

    def answered(self, address: Address) -> None:
        """The address works."""
        if address in self._failures:
            del self._failures[address], self._ejected_until[address]

    def close(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()

    def _refresh(self) -> "asyncio.Task[None]":
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.get_running_loop().create_task(self._look_up())
            # Whoever waits for it raises its error.
            self._refreshing.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._refreshing

    async def _look_up(self) -> None:
        """Look every name up; one that can't be resolved now keeps its addresses."""
        found: dict[Address, str] = {}
        failure: OSError | None = None
        for host, port in self._hosts:
            try:
                addresses = await self._resolve(host, port)
            except OSError as error:
                failure = error
                addresses = [address for address, of in self._addresses.items() if of == host]
            found |= dict.fromkeys(addresses, host)
        if not found:
            raise failure or OSError("the name has no address")
        self._addresses = found
        self._resolved_at = self._clock()
        for gone in self._failures.keys() - found.keys():
            del self._failures[gone], self._ejected_until[gone]


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
