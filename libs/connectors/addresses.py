"""Addresses that a person may not point a connector at: the metadata services of clouds hand out credentials."""

import asyncio
import ipaddress
import socket

from libs.connectors.protocol import ConnectorRefused, ConnectorUnavailable

_REFUSED_NETWORKS = tuple(
    ipaddress.ip_network(text)
    for text in ("169.254.0.0/16", "fe80::/10", "fd00:ec2::254/128", "100.100.100.200/32", "192.0.0.192/32")
)


def is_refused(address: str) -> bool:
    """Whether an IP address is link-local or a known metadata service, also when written as IPv4 in IPv6."""
    parsed = ipaddress.ip_address(address.split("%", 1)[0])
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return any(parsed.version == network.version and parsed in network for network in _REFUSED_NETWORKS)


async def refuse_metadata_address(host: str, port: int, *, timeout_seconds: float) -> None:
    """Resolve ``host`` and raise ``ConnectorRefused`` if any of its addresses is one that may not be called."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_seconds):
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except TimeoutError:
        raise ConnectorUnavailable(f"the name {host} was not resolved within {timeout_seconds:g} s") from None
    except OSError as error:
        raise ConnectorUnavailable(f"the host {host} is not known: {error.strerror or error}") from None
    for _, _, _, _, address in found:
        if is_refused(str(address[0])):
            raise ConnectorRefused(f"host {host}: addresses of metadata services are refused", code="address_refused")
