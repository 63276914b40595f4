"""The identity and keys of an installation, kept in its data directory."""

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
    """What a data directory says about its installation.

    Args:
        id: generated with the directory.
    """

    directory: Path
    id: str
    keys: Keys

    @classmethod
    def of(cls, directory: Path, settings: SuiteSettings) -> Self:
        """Read the directory, and generate what is missing.

        Raises:
            CannotStart: a newer DataSync has used it.
        """
        path = directory / "installation.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        ours, theirs = installed_version(), kept.get("version", "0.0.0")
        if release_of(theirs) > release_of(ours):
            raise CannotStart(
                f"DataSync {theirs} has used {directory.resolve()}, and this is the older {ours}. "
                "Start the newer version, or set DATA_DIR to another directory."
            )
        identifier = kept.get("id") or uuid7()
        write_private(path, json.dumps(kept | {"id": identifier, "version": ours}, indent=2) + "\n")
        return cls(directory, identifier, load_keys(directory, settings))

    @property
    def instance(self) -> str:
        """Identifies the processes of this installation in the store; a copy of it on another machine differs."""
        return f"{self.id}@{socket.gethostname()}"
