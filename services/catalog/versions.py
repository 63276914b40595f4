"""The versions of connectors: one list for all types."""

import re

from libs.core.errors import FieldError, InvalidInput

VERSIONS = ("v1.0.0",)
"""Newest first."""

VERSION_MIN = "v0.6.0"

_VERSION = re.compile(r"v?(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})")


def canonical_version(text: str, field: str = "version") -> str:
    """``latest`` and ``1.0.0`` are ``v1.0.0``; raises ``InvalidInput`` for an unknown version."""
    if text.strip().lower() == "latest":
        return VERSIONS[0]
    numbers = _numbers(text)
    if numbers is None:
        raise _invalid(field, f"must be a semantic version such as {VERSIONS[0]}, or latest")
    if not (_numbers(VERSION_MIN) or ()) <= numbers <= (_numbers(VERSIONS[0]) or ()):
        raise _invalid(field, f"must be from {VERSION_MIN} to {VERSIONS[0]}")
    return "v" + ".".join(str(number) for number in numbers)


def _numbers(text: str) -> tuple[int, ...] | None:
    matched = _VERSION.fullmatch(text.strip())
    return None if matched is None else tuple(int(number) for number in matched.groups())


def _invalid(field: str, message: str) -> InvalidInput:
    return InvalidInput(f"{field}: {message}", errors=[FieldError(field, message)])
