"""Which DataSync this is."""

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """The version of the installed package; ``0.0.0`` where it runs from its sources alone."""
    try:
        return version("datasync")
    except PackageNotFoundError:
        return "0.0.0"
