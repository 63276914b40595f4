"""Whose address a request comes from."""

import ipaddress
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

UNKNOWN = "unknown"

_WITH_PORT = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::[0-9]{1,5})?|([0-9.]+):[0-9]{1,5}")
_OBFUSCATED = re.compile(r"_[A-Za-z0-9._-]{1,63}")

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
            forwarded_for: the values of ``X-Forwarded-For``, each a list to which every proxy appended its peer: an
                address, perhaps with a port, or a name that stands for one (RFC 7239 section 6.3).
        """
        nearest = _parsed(remote or "")
        if nearest is None:
            return UNKNOWN
        if self._trusted:
            hops = [hop.strip() for value in forwarded_for for hop in value.split(",")]
            while self._is_trusted(nearest) and hops:
                hop = hops.pop()
                before = _parsed(_without_port(hop))
                if before is not None:
                    nearest = before
                elif _OBFUSCATED.fullmatch(hop) is not None:
                    return hop
                elif hop:
                    break
        return _text_of(nearest)

    def _is_trusted(self, address: Address) -> bool:
        return any(address in network for network in self._trusted)


def _without_port(hop: str) -> str:
    """``192.0.2.1:80``, ``[2001:db8::1]:80`` and ``[2001:db8::1]`` without what is not the address."""
    matched = _WITH_PORT.fullmatch(hop)
    return hop if matched is None else matched[1] or matched[2]


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
        # The zone of a link-local address is the machine's own matter.
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
