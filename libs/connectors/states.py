"""The state of a stream: how far a job's runs have read it. The destination commits it with the rows."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from libs.core.errors import InvalidInput
from libs.core.json import parse_json


class StreamState(BaseModel):
    """What the next run starts from.

    Args:
        mode: the mode that it is a state of.
        position: the source's own note (``Table.state``), JSON text of an object with ``column`` and ``mark``.
        settings: a digest of the settings that the rows depend on, such as the filter. If it is another one, all rows
            are read again.
        compared_at: when rows were last deleted that the source no longer has.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: Literal[1] = 1
    mode: str
    position: str
    settings: str = ""
    compared_at: datetime | None = None

    @classmethod
    def read(cls, text: str) -> "StreamState | None":
        """Parse what a destination recorded; None for the state of a later version, so that all rows are read."""
        try:
            return cls.model_validate_json(text)
        except ValidationError:
            return None

    @property
    def shown(self) -> str:
        """The position in words."""
        try:
            note = parse_json(self.position.encode())
        except InvalidInput:
            return self.position
        if not isinstance(note, dict):
            return self.position
        return f"{note.get('column') or 'transaction'}: {note.get('mark')}"
