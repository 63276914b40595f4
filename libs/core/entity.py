"""An entity as a caller sees it: its id, the version that was read, and its state."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from libs.core.envelope import Frozen

State = TypeVar("State", bound=Frozen)


@dataclass(frozen=True, slots=True)
class Entity(Generic[State]):
    """An entity's state at a version."""

    id: int | str
    version: int
    state: State
    project_id: int | None = None
