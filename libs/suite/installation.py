"""One installation on one machine: what its data directory says about it."""

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from libs.core.ids import uuid7
from libs.process.private_files import write_private
from libs.process.version import installed_version, release_of
from libs.suite.settings import CannotStart, Keys, SuiteSettings, load_keys


@dataclass(frozen=True, slots=True)
class Installation:
    """What is kept in a data directory that one suite holds.

    Args:
        id: made with the directory.
    """

    directory: Path
    id: str
    keys: Keys

    @classmethod
    def of(cls, directory: Path, settings: SuiteSettings) -> Self:
        """Read the directory, and make what is missing.

        Raises:
            CannotStart: a newer DataSync has worked on it.
        """
        path = directory / "installation.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        ours, theirs = installed_version(), kept.get("version", "0.0.0")
        if release_of(theirs) > release_of(ours):
            raise CannotStart(
                f"DataSync {theirs} has worked on {directory.resolve()}, and this is the older {ours}. "
                "Start the newer one, or set DATA_DIR to another directory."
            )
        identifier = kept.get("id") or uuid7()
        write_private(path, json.dumps(kept | {"id": identifier, "version": ours}, indent=2) + "\n")
        return cls(directory, identifier, load_keys(directory, settings))

    @property
    def instance(self) -> str:
        """Identifies this installation's processes in the store; a copy of the directory on another machine differs."""
        return f"{self.id}@{socket.gethostname()}"
