"""Files that only their owner may read."""

import os
from pathlib import Path

_FILE = 0o600
_DIRECTORY = 0o700


def write_private(path: Path, text: str) -> None:
    """Put a file in its place at once."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, _FILE), "w") as file:
        file.write(text)
    partial.replace(path)


def private_directory(path: Path) -> Path:
    """Make a directory unless it is there."""
    path.mkdir(parents=True, exist_ok=True, mode=_DIRECTORY)
    return path
