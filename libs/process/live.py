"""Settings that may change while the process runs."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar, get_args

from pydantic import Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

T = TypeVar("T")


class Live(Generic[T]):
    """A value that may change while the process runs.

    A settings field of the type ``Live[int]`` is written and validated like an ``int``. Its readers keep the ``Live``
    and take ``value`` each time that they need it, or subscribe.
    """

    def __init__(self, value: T) -> None:
        self._value = value
        self._subscribers: list[Callable[[T], None]] = []

    @property
    def value(self) -> T:
        """The current value."""
        return self._value

    def set(self, value: T) -> None:
        """Replace the value; subscribers are called if it differs."""
        if value == self._value:
            return
        self._value = value
        for subscriber in self._subscribers:
            subscriber(value)

    def subscribe(self, subscriber: Callable[[T], None]) -> None:
        """Call ``subscriber`` with every later value, for as long as the process runs."""
        self._subscribers.append(subscriber)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Live) and self._value == other._value

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Live({self._value!r})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        (of,) = get_args(source)
        return core_schema.no_info_wrap_validator_function(
            _validated,
            handler.generate_schema(of),
            serialization=core_schema.plain_serializer_function_ser_schema(lambda live: live.value),
        )


def live(default: Any) -> Any:
    """A ``Live`` field of a settings class with this default."""
    return Field(default_factory=lambda: Live(default))


def _validated(given: Any, validate: Callable[[Any], Any]) -> Live[Any]:
    if not isinstance(given, Live):
        return Live(validate(given))
    given.set(validate(given.value))
    return given
