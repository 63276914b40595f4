"""Whose address a request comes from."""

import ipaddress
from collections.abc import Iterable, Sequence
from functools import lru_cache

UNKNOWN = "unknown"

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class ClientAddresses:
    """Finds the client behind the proxies that are trusted.

    Args:
        trusted_proxies: networks whose ``X-Forwarded-For`` is believed; anybody else's may be made up.
    """

    def __init__(self, trusted_proxies: Iterable[Network]) -> None:
        self._trusted = tuple(trusted_proxies)

    def of(self, remote: str | None, forwarded_for: Sequence[str]) -> str:
        """The nearest address that is no trusted proxy.

        Args:
            remote: the peer of the connection.
            forwarded_for: the values of ``X-Forwarded-For``, each a list to which every proxy appended its peer.
        """
        nearest = _parsed(remote or "")
        if nearest is None:
            return UNKNOWN
        if self._trusted:
            hops = [hop for value in forwarded_for for hop in value.split(",")]
            while self._is_trusted(nearest) and hops:
                before = _parsed(hops.pop().strip())
                if before is None:
                    break
                nearest = before
        return _text_of(nearest)

    def _is_trusted(self, address: Address) -> bool:
        return any(address in network for network in self._trusted)


def subject_of(address: str) -> str:
    """What counts as one client: an IPv4 address, or the /64 network that an IPv6 host can roam in (RFC 6177)."""
    parsed = _parsed(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return address


@lru_cache(maxsize=4096)
def _text_of(address: Address) -> str:
    return str(address)


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
