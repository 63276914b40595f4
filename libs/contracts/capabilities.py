"""What a connector can do, so that a job that asks for more is refused when it is created."""

from dataclasses import dataclass

FULL_REFRESH = "full_refresh"
INCREMENTAL = "incremental"


@dataclass(frozen=True, slots=True)
class SourceCapabilities:
    """What a source can do.

    Args:
        modes: how it can be read.
        cursorless: it finds rows that changed without a cursor.
        filters: it applies filters.
    """

    modes: frozenset[str] = frozenset((FULL_REFRESH,))
    cursorless: bool = False
    filters: bool = False


@dataclass(frozen=True, slots=True)
class DestinationCapabilities:
    """What a destination can do.

    Args:
        appends, merges: it adds rows to a table, or inserts and updates them by key.
        deletes: how it treats rows that the source deleted.
        partitions: it lays out rows by ``partition_regex``.
    """

    appends: bool = False
    merges: bool = False
    deletes: frozenset[str] = frozenset()
    partitions: bool = False


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Of a job's two ends."""

    source: SourceCapabilities
    destination: DestinationCapabilities


EVERYTHING = Capabilities(
    SourceCapabilities(frozenset((FULL_REFRESH, INCREMENTAL)), cursorless=True, filters=True),
    DestinationCapabilities(appends=True, merges=True, deletes=frozenset(("soft", "hard")), partitions=True),
)
"""What is assumed of ends that are not known yet."""
