"""Whose address a request comes from."""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from libs.core.addresses import UNKNOWN_CLIENT, IPAddress, IPNetwork, client_address, is_obfuscated

_WITH_PORT = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::[0-9]{1,5})?|([0-9.]+):[0-9]{1,5}")


class ClientAddresses:
    """Finds the client behind trusted proxies.

    Args:
        trusted_proxies: the networks whose ``X-Forwarded-For`` is used; anybody else's may be forged.
    """

    def __init__(self, trusted_proxies: Iterable[IPNetwork]) -> None:
        self._trusted = tuple(trusted_proxies)

    def of(self, remote: str | None, forwarded_for: Sequence[str]) -> str:
        """The nearest address that is not a trusted proxy.

        Args:
            remote: the peer of the connection.
            forwarded_for: the values of ``X-Forwarded-For``, each a list to which every proxy has appended its peer:
                an address, perhaps with a port, or an obfuscated identifier (RFC 7239 section 6.3).
        """
        nearest = client_address(remote or "")
        if nearest is None:
            return UNKNOWN_CLIENT
        if self._trusted:
            hops = [hop.strip() for value in forwarded_for for hop in value.split(",")]
            while self._is_trusted(nearest) and hops:
                hop = hops.pop()
                before = client_address(_without_port(hop))
                if before is not None:
                    nearest = before
                elif is_obfuscated(hop):
                    return hop
                elif hop:
                    break
        return _text_of(nearest)

    def _is_trusted(self, address: IPAddress) -> bool:
        return any(address in network for network in self._trusted)


def _without_port(hop: str) -> str:
    """The address in ``192.0.2.1:80``, ``[2001:db8::1]:80`` or ``[2001:db8::1]``."""
    matched = _WITH_PORT.fullmatch(hop)
    return hop if matched is None else matched[1] or matched[2]


@lru_cache(maxsize=4096)
def _text_of(address: IPAddress) -> str:
    return str(address)
