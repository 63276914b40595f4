"""What a rebuild reports, or why it failed."""

from dataclasses import dataclass
from typing import Any

NEWER_VERSION = "only a newer version of the service can read it: run the rebuild with that version"


class RebuildFailed(Exception):
    """The rebuild gave up; the live documents are unchanged."""


@dataclass(frozen=True, slots=True)
class CollectionReport:
    """The live documents of one collection compared with the rebuilt ones.

    Args:
        live_hash, rebuilt_hash: SHA-256 over the canonical documents in the order of their ids.
        different: ids of documents that are missing, superfluous or different; the first few.
        different_count: how many there are in all.
    """

    name: str
    live_count: int
    rebuilt_count: int
    live_hash: str
    rebuilt_hash: str
    different: tuple[Any, ...]
    different_count: int


@dataclass(frozen=True, slots=True)
class RebuildReport:
    """What a rebuild found and did.

    Args:
        position: the position of the service's store at which the documents were compared.
        swapped: whether the rebuilt documents are the live ones now.
    """

    position: int
    collections: tuple[CollectionReport, ...]
    swapped: bool
    seconds: float

    @property
    def is_equal(self) -> bool:
        return all(item.live_hash == item.rebuilt_hash for item in self.collections)
