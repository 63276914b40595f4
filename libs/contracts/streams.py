"""A job's stream catalog (``streams_config``, the shape of OLake's) and its further settings: model, parser, checks.

Orchestrator and worker both read a catalog through ``parse_streams_config``. The orchestrator refuses a job that asks
for something unsupported (``unsupported``); a run checks again per stream (``chosen_streams``), because its streams
may be discovered only then.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, ValidationError

from libs.core.errors import InvalidInput
from libs.core.json import parse_json
from libs.core.validation import field_errors

StreamKey = tuple[str, str]
"""A stream's namespace and name."""
FULL_REFRESH = "full_refresh"
PATH_LENGTH_MAX = 200
SYNC_MODES = (FULL_REFRESH, "incremental", "cdc", "strict_cdc")

# Settings whose change makes the data at the destination useless, of a stream and of its selection.
STREAM_SETTINGS = ("sync_mode", "cursor_field", "destination_database", "destination_table")
SELECTION_SETTINGS = ("normalization", "partition_regex", "append_mode", "filter", "filter_config")

ModelT = TypeVar("ModelT", bound=BaseModel)


def _or(default: Any) -> BeforeValidator:
    """Front ends send null or an empty string for fields that are not set."""
    return BeforeValidator(lambda value: default if value in (None, "") else value)


class _Part(BaseModel):
    """Part of a catalog. Unknown fields are kept, so that they can be reported by name and written back."""

    model_config = ConfigDict(frozen=True, extra="allow")


class TypeSchema(_Part):
    properties: dict[str, Any] | None = None


class CatalogStream(_Part):
    """A stream as it was discovered, and where it goes."""

    name: str
    namespace: Annotated[str, _or("")] = ""
    sync_mode: Annotated[str, _or(FULL_REFRESH)] = FULL_REFRESH
    cursor_field: Any = None
    destination_database: str | None = Field(
        default=None,
        description="The destination's namespace, such as a schema. Defaults to the source's namespace.",
        examples=["lake:public"],
    )
    destination_table: str | None = Field(
        default=None, description="The destination's table. Defaults to the stream's name.", examples=["orders"]
    )
    type_schema: TypeSchema | None = None

    @property
    def key(self) -> StreamKey:
        return self.namespace, self.name

    @property
    def columns(self) -> Mapping[str, Any]:
        """By name; empty if the catalog does not list them."""
        return (self.type_schema.properties if self.type_schema else None) or {}

    @property
    def target(self) -> tuple[str, str]:
        """Namespace and table at the destination; ``prefix:namespace`` means the namespace ``prefix_namespace``."""
        namespace = (self.destination_database or self.namespace).replace(":", "_")
        return namespace, self.destination_table or self.name


class CatalogEntry(_Part):
    stream: CatalogStream


class SelectedColumns(_Part):
    columns: list[str] | None = Field(
        default=None, description="The columns to move. Defaults to all.", examples=[["id", "placed_at"]]
    )
    sync_new_columns: Annotated[bool, _or(False)] = Field(
        default=False, description="Also move columns that the catalog does not list yet."
    )


class FilterConfig(_Part):
    logical_operator: Any = None
    conditions: list[Any] | None = None


class SelectedStream(_Part):
    """A stream to move. Settings that are not supported yet are refused."""

    stream_name: str = Field(examples=["orders"])
    disabled: Annotated[bool, _or(False)] = Field(default=False, description="The stream is not moved.")
    append_mode: Annotated[bool, _or(False)] = False
    normalization: Annotated[bool | None, _or(None)] = None
    partition_regex: str | None = None
    filter: Any = None
    filter_config: FilterConfig | None = None
    chunk_column: str | None = None
    split_column: str | None = None
    selected_columns: SelectedColumns | None = None
    value_policies: Annotated[dict[str, Literal["fail", "null", "text"]], _or({})] = Field(
        default_factory=dict,
        description="What happens, per column, to a value that the destination cannot store: the stream fails, the "
        "value becomes null, or the whole column is stored as text.",
        examples=[{"born": "null"}],
    )


@dataclass(frozen=True, slots=True)
class Selection:
    """An entry of ``selected_streams`` and its path within the catalog."""

    key: StreamKey
    path: str
    selected: SelectedStream


class StreamsConfig(_Part):
    """A job's ``streams_config``. If nothing is selected all ``streams`` are moved, or all that are discovered."""

    selected_streams: Annotated[dict[str, Annotated[list[SelectedStream], _or([])]], _or({})] = Field(
        default_factory=dict
    )
    streams: Annotated[list[CatalogEntry], _or([])] = Field(default_factory=list)

    @property
    def selections(self) -> list[Selection]:
        return [
            Selection((namespace, selected.stream_name), f"selected_streams.{namespace}[{index}]", selected)
            for namespace, streams in self.selected_streams.items()
            for index, selected in enumerate(streams)
        ]


class AdvancedSettings(_Part):
    """A job's ``advanced_settings``."""

    max_discover_threads: Annotated[int, Field(strict=True, ge=1, le=1000)] | None = Field(
        default=None, description="The maximum number of connections of a discovery, which uses one."
    )
    verify: Annotated[StrictBool, _or(False)] = Field(
        default=False,
        description="Compare source and destination before each stream is committed: both hash all its rows, which "
        "costs each server about twice as much as reading them.",
    )
    take_over: Annotated[StrictBool, _or(False)] = Field(
        default=False, description="The job may write to tables of this project's deleted jobs."
    )


def parse_streams_config(text: str, field: str = "streams_config") -> StreamsConfig:
    """Parse a catalog's JSON text; an empty text is an empty catalog. Raises ``InvalidInput`` with the paths."""
    return _parsed(StreamsConfig, text, field)


def parse_advanced_settings(text: str, field: str = "advanced_settings") -> AdvancedSettings:
    """Parse the JSON text of advanced settings, which may be ``null``. Raises ``InvalidInput`` with the paths."""
    return _parsed(AdvancedSettings, text, field)


def _parsed(model: type[ModelT], text: str, field: str) -> ModelT:
    value = parse_json(text.encode(), subject=field) if text.strip() else None
    try:
        return model.model_validate({} if value is None else value)
    except ValidationError as error:
        errors = [replace(item, field=item.field[:PATH_LENGTH_MAX]) for item in field_errors(error, field)]
        raise InvalidInput("; ".join(f"{item.field}: {item.message}" for item in errors), errors=errors) from None


@dataclass(frozen=True, slots=True)
class Refusal:
    """``field`` is a path within the catalog, such as ``selected_streams.public[0].filter``, or empty."""

    field: str
    message: str


@dataclass(frozen=True, slots=True)
class ChosenStream:
    """A stream that a job moves, and the settings of it that are not supported."""

    stream: CatalogStream
    selected: SelectedStream
    refusals: tuple[Refusal, ...] = ()


def chosen_streams(config: StreamsConfig, entries: Sequence[CatalogEntry]) -> list[ChosenStream]:
    """The streams that a job moves, in the catalog's order; selected streams that the catalog lacks come last.

    Args:
        entries: the job's own ``streams``, or the discovered ones if it has none.
    """
    known = {entry.stream.key: (f"streams[{index}].stream", entry.stream) for index, entry in enumerate(entries)}
    places = {key: place for key, (place, _) in known.items()}
    if not config.selections:
        everything = [
            ChosenStream(stream, SelectedStream(stream_name=stream.name), tuple(_of_stream(stream, place)))
            for place, stream in known.values()
        ]
        return _refuse_shared_targets(everything, places)
    order = {key: index for index, key in enumerate(known)}
    twice = _duplicates(item.key for item in config.selections)
    chosen = []
    for item in sorted(config.selections, key=lambda item: order.get(item.key, len(order))):
        if item.selected.disabled:
            continue
        place, stream = known.get(item.key, ("", CatalogStream(name=item.key[1], namespace=item.key[0])))
        found = list(_of_selection(item, stream))
        if not place:
            found.append(_missing(item, is_discovered=not config.streams))
        elif item.key in twice:
            found.append(_selected_twice(item))
        else:
            found += _of_stream(stream, place)
        chosen.append(ChosenStream(stream, item.selected, tuple(found)))
    return _refuse_shared_targets(chosen, places)


def difference(before: StreamsConfig, after: StreamsConfig) -> StreamsConfig:
    """The catalog, as it was before, of the streams that are selected in both and must be cleared to go on.

    A newly selected stream has nothing to clear, and one that is no longer selected keeps its data.
    """
    selected_before = {item.key: item.selected for item in before.selections}
    selected_after = {item.key: item.selected for item in after.selections}
    defined_before = {entry.stream.key: entry.stream for entry in before.streams}
    defined_after = {entry.stream.key: entry.stream for entry in after.streams}
    changed = sorted(
        key
        for key in selected_before.keys() & selected_after.keys()
        if _settings(selected_before[key], SELECTION_SETTINGS) != _settings(selected_after[key], SELECTION_SETTINGS)
        or _settings(defined_before.get(key), STREAM_SETTINGS) != _settings(defined_after.get(key), STREAM_SETTINGS)
    )
    selected: dict[str, list[SelectedStream]] = {}
    for namespace, name in changed:
        selected.setdefault(namespace, []).append(selected_before[namespace, name])
    streams = [CatalogEntry(stream=defined_before[key]) for key in changed if key in defined_before]
    return StreamsConfig(selected_streams=selected, streams=streams)


def _settings(part: _Part | None, names: Sequence[str]) -> list[Any]:
    given = {} if part is None else part.model_dump(include=set(names), exclude_unset=True)
    return [given.get(name) or None for name in names]


def unsupported(config: StreamsConfig) -> list[Refusal]:
    """What no run can do, as far as the catalog shows it without its source."""
    found: list[Refusal] = []
    if config.streams:
        twice = _duplicates(entry.stream.key for entry in config.streams)
        found += [
            Refusal(f"streams[{index}].stream.name", "is in the catalog twice")
            for index, entry in enumerate(config.streams)
            if entry.stream.key in twice
        ]
        found += [refusal for item in chosen_streams(config, config.streams) for refusal in item.refusals]
    else:
        twice = _duplicates(item.key for item in config.selections)
        for item in config.selections:
            found += _of_selection(item, CatalogStream(name=item.key[1], namespace=item.key[0]))
            if item.key in twice:
                found.append(_selected_twice(item))
    if config.selections and all(item.selected.disabled for item in config.selections):
        found.append(Refusal("selected_streams", "every selected stream is disabled"))
    return found


def unknown_sync_modes(config: StreamsConfig) -> Iterator[Refusal]:
    """The streams whose ``sync_mode`` is none at all, supported or not."""
    for index, entry in enumerate(config.streams):
        if entry.stream.sync_mode not in SYNC_MODES:
            yield Refusal(f"streams[{index}].stream.sync_mode", f"must be one of {', '.join(SYNC_MODES)}")


def unknown_fields_of_choice(config: StreamsConfig) -> Iterator[Refusal]:
    """The unknown fields of a catalog outside its ``streams``, which may have any."""
    # A discovery's answer holds the catalog a second time under this name, and may be sent back as it is.
    yield from unknown_fields(config, ignored=("streams_config",))
    for item in config.selections:
        yield from unknown_fields(item.selected, item.path)
        yield from unknown_fields(item.selected.selected_columns, f"{item.path}.selected_columns")
        yield from unknown_fields(item.selected.filter_config, f"{item.path}.filter_config")


def unknown_fields(part: _Part | None, path: str = "", ignored: Sequence[str] = ()) -> Iterator[Refusal]:
    """The fields that a model does not have, each with the similar one that was probably meant."""
    if part is None:
        return
    known = sorted(type(part).model_fields)
    for name in part.model_extra or ():
        if name not in ignored:
            near = _similar(name, known)
            hint = f"; did you mean {near}?" if near else ""
            yield Refusal(f"{path}.{name}" if path else name, f"is not a known field{hint}")


def _similar(name: str, known: Sequence[str]) -> str | None:
    """A known name that ends in this one, such as ``selected_columns`` for ``columns``, or else a close one."""
    longer = [one for one in known if one.endswith(f"_{name}")]
    return next(iter(longer or difflib.get_close_matches(name, known, n=1)), None)


def _duplicates(keys: Iterable[StreamKey]) -> set[StreamKey]:
    seen: set[StreamKey] = set()
    return {key for key in keys if key in seen or seen.add(key)}  # type: ignore[func-returns-value]


def _missing(item: Selection, *, is_discovered: bool) -> Refusal:
    if is_discovered:
        return Refusal("", f"the source has no table {_dotted(item.key)}, or the role may not read it")
    return Refusal(f"{item.path}.stream_name", "is not one of the catalog's streams")


def _selected_twice(item: Selection) -> Refusal:
    return Refusal(f"{item.path}.stream_name", "is selected twice")


_UNSUPPORTED: tuple[tuple[str, Callable[[SelectedStream], Any], str], ...] = (
    ("append_mode", lambda selected: selected.append_mode, "appending is not supported: each run replaces the table"),
    (
        "normalization",
        lambda selected: selected.normalization is False,
        "false is not supported: each column of the source becomes a column of the destination",
    ),
    ("partition_regex", lambda selected: selected.partition_regex, "partitioning is not supported"),
    ("filter", lambda selected: selected.filter, "a filter is not supported"),
    (
        "filter_config",
        lambda selected: selected.filter_config and selected.filter_config.conditions,
        "a filter is not supported",
    ),
    ("chunk_column", lambda selected: selected.chunk_column, "choosing the chunk column is not supported"),
    ("split_column", lambda selected: selected.split_column, "choosing the chunk column is not supported"),
)


def _of_selection(item: Selection, stream: CatalogStream) -> Iterator[Refusal]:
    selected, path = item.selected, item.path
    if selected.disabled:
        return
    for name, is_set, message in _UNSUPPORTED:
        if is_set(selected):
            yield Refusal(f"{path}.{name}", message)
    if not stream.columns:
        return
    columns = (selected.selected_columns.columns if selected.selected_columns else None) or []
    for index, column in enumerate(columns):
        if column not in stream.columns:
            yield Refusal(f"{path}.selected_columns.columns[{index}]", f"the stream has no column {column!r}")
    for column in selected.value_policies:
        if column not in stream.columns:
            yield Refusal(f"{path}.value_policies.{column}", f"the stream has no column {column!r}")
        elif columns and column not in columns:
            yield Refusal(f"{path}.value_policies.{column}", f"the column {column!r} is not selected")


def _of_stream(stream: CatalogStream, path: str) -> Iterator[Refusal]:
    if stream.sync_mode != FULL_REFRESH:
        yield Refusal(f"{path}.sync_mode", f"{stream.sync_mode} is not supported yet, only {FULL_REFRESH} is")
    for column, described in stream.columns.items():
        renamed = described.get("destination_column_name") if isinstance(described, Mapping) else None
        if renamed and renamed != column:
            place = f"{path}.type_schema.properties.{column}.destination_column_name"
            yield Refusal(place, f"renaming a column is not supported ({column} to {renamed})")


def _refuse_shared_targets(chosen: list[ChosenStream], places: Mapping[StreamKey, str]) -> list[ChosenStream]:
    """Refuse every stream that has the same target as another one."""
    by_target: dict[tuple[str, str], list[ChosenStream]] = {}
    for item in chosen:
        by_target.setdefault(item.stream.target, []).append(item)
    marked = []
    for item in chosen:
        others = [other.stream for other in by_target[item.stream.target] if other.stream.key != item.stream.key]
        if others and (place := places.get(item.stream.key)):
            message = f"{_dotted(others[0].key)} goes to {_dotted(item.stream.target)} as well"
            refusal = Refusal(f"{place}.destination_table", message)
            item = ChosenStream(item.stream, item.selected, (*item.refusals, refusal))
        marked.append(item)
    return marked


def _dotted(name: StreamKey) -> str:
    return ".".join(filter(None, name))
