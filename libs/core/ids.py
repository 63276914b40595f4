"""Identifiers: time-ordered UUIDs, base62 tokens, stream names."""

import secrets
import zlib

import uuid_utils

_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def uuid7() -> str:
    """A UUIDv7 (RFC 9562 section 5.7): unique, and ordered by the time it was made."""
    return str(uuid_utils.uuid7())


def base62(value: int, width: int = 0) -> str:
    """``value`` in base 62 (digits, upper case, lower case), padded with ``0`` to ``width`` characters."""
    digits = []
    while value:
        value, digit = divmod(value, 62)
        digits.append(_BASE62[digit])
    return "".join(reversed(digits)).rjust(width, "0")


def random_base62(length: int) -> str:
    """``length`` characters of base 62 from the operating system's random source."""
    return "".join(secrets.choice(_BASE62) for _ in range(length))


def checksum_base62(text: str) -> str:
    """Six characters of base 62 that a mistyped or cut-off token does not match (CRC-32)."""
    return base62(zlib.crc32(text.encode()), 6)


def stream_name(aggregate: str, entity_id: int | str) -> str:
    """``source`` and 42 make the stream ``source-42``."""
    return f"{aggregate}-{entity_id}"
