"""Which DataSync this is."""

import re
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of


def installed_version() -> str:
    """The version of the installed package; ``0.0.0`` where it runs from its sources alone."""
    try:
        return version_of("datasync")
    except PackageNotFoundError:
        return "0.0.0"


def release_of(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with, for comparing: ``1.12.0rc1`` is ``(1, 12, 0)``."""
    matched = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(number) for number in matched[0].split(".")) if matched else ()
