"""Which IP addresses may be called: one rule for all addresses that users can make DataSync connect to.

Several forms of IPv6 addresses contain an IPv4 address, to which a translator or relay would forward. So an address
is judged together with every IPv4 address that it contains.
"""

import ipaddress
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from urllib.parse import urlsplit

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
UNKNOWN_CLIENT = "unknown"

# Link-local addresses, and those at which clouds serve the credentials of the machine (AWS, Azure and GCP, Alibaba,
# Oracle). 192.0.0.192 is Oracle's, fd00:ec2::/32 has AWS's services, fd20:ce::/64 is Google's.
_METADATA_NETWORKS = tuple(
    ipaddress.ip_network(text)
    for text in (
        "169.254.0.0/16",
        "100.100.100.200/32",
        "192.0.0.192/32",
        "168.63.129.16/32",
        "fe80::/10",
        "fd00:ec2::/32",
        "fd20:ce::/64",
    )
)
# The last 32 bits are an IPv4 address: NAT64 (RFC 6052, RFC 8215) and the deprecated IPv4-compatible form (RFC 4291).
_IPV4_AT_THE_END = tuple(ipaddress.IPv6Network(text) for text in ("64:ff9b::/96", "64:ff9b:1::/48", "::/96"))
_OBFUSCATED = re.compile(r"_[A-Za-z0-9._-]{1,63}")
_ISATAP_IDENTIFIERS = (0x0000_5EFE, 0x0200_5EFE)


def parse_address(text: str) -> IPAddress:
    """An address as ``getaddrinfo`` or a socket returns it, without its zone; raises ``ValueError``."""
    return ipaddress.ip_address(text.split("%", 1)[0])


@lru_cache(maxsize=4096)
def client_address(text: str) -> IPAddress | None:
    """The address of a connection's peer, an IPv4-mapped one as IPv4; None if the text is not an address."""
    try:
        address = parse_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def one_client(text: str) -> str:
    """What counts as one client: an IPv4 address, or the /64 network of an IPv6 address (RFC 6177).

    So does the name that a proxy may give in place of an address (RFC 7239 section 6.3). All other texts are one
    client, ``unknown``.
    """
    address = client_address(text)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    if address is None:
        return text if is_obfuscated(text) else UNKNOWN_CLIENT
    return str(address)


def is_obfuscated(text: str) -> bool:
    """Whether it is a name that a proxy gives in place of an address."""
    return _OBFUSCATED.fullmatch(text) is not None


def is_metadata_address(address: IPAddress) -> bool:
    """Whether the address, or one that it contains, is link-local or a cloud's metadata service."""
    return any(
        meant.version == network.version and meant in network
        for meant in _meant_by(address)
        for network in _METADATA_NETWORKS
    )


def is_public_address(address: IPAddress) -> bool:
    """Whether the address and every one that it contains are public unicast addresses."""
    return all(meant.is_global and not meant.is_multicast for meant in _meant_by(address)) and not is_metadata_address(
        address
    )


def outbound_fault(url: str, allowed: Sequence[IPNetwork] = ()) -> str | None:
    """Why a URL that a user gave must not be called; None if nothing is wrong with it so far.

    A host name's addresses are judged when it is called, because they may be others by then.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "must be an http or https address"
    if parts.scheme not in ("http", "https") or not host or re.search(r"\s", url):
        return "must be an http or https address"
    if parts.username is not None or parts.password is not None:
        return "must be without credentials"
    if host == "localhost" or host.endswith(".localhost"):
        address: IPAddress | None = ipaddress.IPv4Address("127.0.0.1")
    else:
        address = _literal(host)
    if address is None or any(address.version == network.version and address in network for network in allowed):
        return None
    if is_public_address(address):
        return None
    return "must not be a private address, unless OUTBOUND_ALLOWED_NETWORKS names its network"


def _literal(host: str) -> IPAddress | None:
    """The address in a host's text, also in the short, octal and hexadecimal forms that resolvers accept."""
    try:
        return parse_address(host)
    except ValueError:
        pass
    try:
        *first, last = [_number(part) for part in host.split(".")]
        size_bytes_left = 4 - len(first)
        return ipaddress.IPv4Address(bytes(first) + last.to_bytes(size_bytes_left, "big"))
    except (ValueError, OverflowError):
        return None


def _number(text: str) -> int:
    """As ``inet_aton`` reads it; raises ``ValueError``."""
    if re.fullmatch(r"0[0-7]+", text):
        return int(text, 8)
    return int(text, 0) if re.fullmatch(r"[0-9]+|0[xX][0-9a-fA-F]+", text) else int("no number")


def _meant_by(address: IPAddress) -> Iterator[IPAddress]:
    """The addresses that packets to this one may reach; for an IPv4-mapped one that is only its IPv4 address."""
    if isinstance(address, ipaddress.IPv4Address):
        yield address
        return
    if address.ipv4_mapped is not None:
        yield address.ipv4_mapped
        return
    yield address
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo
    if int(address) >> 32 & 0xFFFF_FFFF in _ISATAP_IDENTIFIERS or any(
        address in network for network in _IPV4_AT_THE_END
    ):
        yield ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
