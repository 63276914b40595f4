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

from libs.contracts.capabilities import EVERYTHING, FULL_REFRESH, INCREMENTAL, Capabilities
from libs.contracts.filters import Filter, InvalidFilter, filter_of, parse_filter
from libs.core.errors import InvalidInput
from libs.core.json import parse_json
from libs.core.schedule import parse_frequency
from libs.core.validation import field_errors

StreamKey = tuple[str, str]
"""A stream's namespace and name."""
PATH_LENGTH_MAX = 200
SYNC_MODES = (FULL_REFRESH, INCREMENTAL, "cdc", "strict_cdc")
LAG_SECONDS_MAX = 7 * 24 * 3600
EVERY_RUN = "every run"

# Settings whose change makes the data at the destination useless, of a stream and of its selection.
STREAM_SETTINGS = ("sync_mode", "cursor_field", "destination_database", "destination_table")
SELECTION_SETTINGS = (
    *("normalization", "partition_regex", "append_mode", "filter", "filter_config", "primary_key", "null_cursors"),
)

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
    cursor_field: Annotated[str, _or("")] = Field(
        default="",
        description="For the mode `incremental`: the column whose greatest value tells how far a run has read, or two "
        "columns as `cursor:fallback`. Without one, rows that changed are found by transaction.",
        examples=["updated_at"],
    )
    available_cursor_fields: list[str] | None = None
    source_defined_primary_key: list[str] | None = None
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
    def cursors(self) -> tuple[str, ...]:
        """The cursor and its fallback, those that are given."""
        return tuple(name for name in self.cursor_field.split(":", 1) if name)

    @property
    def renames(self) -> dict[str, str]:
        """The destination's names of columns, where they are others."""
        named = {
            column: described.get("destination_column_name")
            for column, described in self.columns.items()
            if isinstance(described, Mapping)
        }
        return {column: str(name) for column, name in named.items() if name and name != column}

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
    logical_operator: Any = Field(default=None, description="`and` or `or`.", examples=["and"])
    conditions: list[Any] | None = Field(
        default=None,
        description="Comparisons: `column`, `operator` (`=`, `!=`, `<`, `<=`, `>`, `>=`) and `value`.",
        examples=[[{"column": "id", "operator": ">", "value": 100}]],
    )


class DeletesConfig(_Part):
    """What happens to rows that the source deleted: the keys of both ends are compared on a schedule."""

    mode: Literal["soft", "hard"] = Field(
        description="`hard` deletes the destination's rows, `soft` sets their column `_datasync_deleted_at`."
    )
    schedule: Annotated[str, _or("@daily")] = Field(
        default="@daily",
        description="How often the keys are compared, as a job's frequency; `every run` for each run.",
        examples=["@daily"],
    )


class SelectedStream(_Part):
    """A stream to move. Settings that are not supported yet are refused."""

    stream_name: str = Field(examples=["orders"])
    disabled: Annotated[bool, _or(False)] = Field(default=False, description="The stream is not moved.")
    append_mode: Annotated[bool, _or(False)] = Field(
        default=False, description="Rows are added to the destination's and never updated."
    )
    normalization: Annotated[bool | None, _or(None)] = None
    partition_regex: str | None = None
    filter: Annotated[str, _or("")] = Field(
        default="",
        description="Only rows that match are moved: comparisons joined by `and`, or by `or`. Names and values with "
        "other characters than letters, digits and underscores stand in double quotation marks.",
        examples=['id > 100 and state = "new"'],
    )
    filter_config: FilterConfig | None = Field(default=None, description="A filter as an object.")
    primary_key: Annotated[list[str], _or([])] = Field(
        default_factory=list,
        description="The columns that identify a row, for a table without a primary key, or instead of it.",
        examples=[["id"]],
    )
    null_cursors: Annotated[Literal["never", "first", "always"], _or("first")] = Field(
        default="first",
        description="When rows without a cursor value are read: never, when all rows are read, or in every run.",
    )
    lag_seconds: Annotated[float, Field(ge=0, le=LAG_SECONDS_MAX)] | None = Field(
        default=None,
        description="How far before the greatest cursor, a time, the next run begins, for rows that are committed "
        "late. Without it, the run begins where the oldest open transaction had begun.",
    )
    schema_policy: Annotated[Literal["evolve", "freeze", "ignore"] | None, _or(None)] = Field(
        default=None,
        description="What happens if the source's columns change: the destination follows, the stream fails, or only "
        "the columns that the destination has are moved. Defaults to the job's.",
    )
    deletes: DeletesConfig | None = Field(
        default=None, description="For the mode `incremental`. Without it, rows that the source deleted stay."
    )
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
    schema_policy: Annotated[Literal["evolve", "freeze", "ignore"], _or("evolve")] = Field(
        default="evolve",
        description="What happens if a source's columns change: the destination follows (`evolve`), the stream fails "
        "(`freeze`), or only the columns that the destination has are moved (`ignore`).",
    )
    concurrent_streams: Annotated[int, Field(strict=True, ge=1, le=16)] | None = Field(
        default=None, description="How many streams a run moves at the same time. Defaults to 1."
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

    @property
    def row_filter(self) -> Filter | None:
        """The filter, in either notation; None if there is none or it is among the refusals."""
        try:
            return _filter(self.selected)
        except InvalidFilter:
            return None


def chosen_streams(
    config: StreamsConfig, entries: Sequence[CatalogEntry], can: Capabilities = EVERYTHING
) -> list[ChosenStream]:
    """The streams that a job moves, in the catalog's order; selected streams that the catalog lacks come last.

    Args:
        entries: the job's own ``streams``, or the discovered ones if it has none.
        can: what the job's ends can do.
    """
    known = {entry.stream.key: (f"streams[{index}].stream", entry.stream) for index, entry in enumerate(entries)}
    places = {key: place for key, (place, _) in known.items()}
    if not config.selections:
        everything = []
        for place, stream in known.values():
            selected = SelectedStream(stream_name=stream.name)
            refusals = _of_stream(stream, selected, place, can)
            everything.append(ChosenStream(stream, selected, tuple(refusals)))
        return _refuse_shared_targets(everything, places)
    order = {key: index for index, key in enumerate(known)}
    twice = _duplicates(item.key for item in config.selections)
    chosen = []
    for item in sorted(config.selections, key=lambda item: order.get(item.key, len(order))):
        if item.selected.disabled:
            continue
        place, stream = known.get(item.key, ("", CatalogStream(name=item.key[1], namespace=item.key[0])))
        found = list(_of_selection(item, stream, can))
        if not place:
            found.append(_missing(item, is_discovered=not config.streams))
        elif item.key in twice:
            found.append(_selected_twice(item))
        else:
            found += _of_stream(stream, item.selected, place, can)
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


def unsupported(config: StreamsConfig, can: Capabilities = EVERYTHING) -> list[Refusal]:
    """What no run between ends that can do this can do, as far as the catalog shows it without its source."""
    found: list[Refusal] = []
    if config.streams:
        twice = _duplicates(entry.stream.key for entry in config.streams)
        found += [
            Refusal(f"streams[{index}].stream.name", "is in the catalog twice")
            for index, entry in enumerate(config.streams)
            if entry.stream.key in twice
        ]
        found += [refusal for item in chosen_streams(config, config.streams, can) for refusal in item.refusals]
    else:
        twice = _duplicates(item.key for item in config.selections)
        for item in config.selections:
            found += _of_selection(item, CatalogStream(name=item.key[1], namespace=item.key[0]), can)
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
        yield from unknown_fields(item.selected.deletes, f"{item.path}.deletes")


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
    (
        "normalization",
        lambda selected: selected.normalization is False,
        "false is not supported: each column of the source becomes a column of the destination",
    ),
    ("chunk_column", lambda selected: selected.chunk_column, "choosing the chunk column is not supported"),
    ("split_column", lambda selected: selected.split_column, "choosing the chunk column is not supported"),
)


def _of_selection(item: Selection, stream: CatalogStream, can: Capabilities) -> Iterator[Refusal]:
    selected, path = item.selected, item.path
    if selected.disabled:
        return
    for name, is_set, message in _UNSUPPORTED:
        if is_set(selected):
            yield Refusal(f"{path}.{name}", message)
    if selected.append_mode and not can.destination.appends:
        yield Refusal(f"{path}.append_mode", "the destination can't append rows")
    if selected.partition_regex and not can.destination.partitions:
        yield Refusal(f"{path}.partition_regex", "the destination does not lay out rows in partitions")
    yield from _of_deletes(selected, path, can)
    yield from _of_filter(selected, stream, path, can)
    if stream.columns:
        yield from _of_columns(selected, stream, path)


def _of_deletes(selected: SelectedStream, path: str, can: Capabilities) -> Iterator[Refusal]:
    if selected.deletes is None:
        return
    if selected.append_mode:
        yield Refusal(f"{path}.deletes", "rows that are appended are never deleted")
    elif selected.deletes.mode not in can.destination.deletes:
        yield Refusal(f"{path}.deletes.mode", "the destination does not support it")
    try:
        selected.deletes.schedule.lower() == EVERY_RUN or parse_frequency(selected.deletes.schedule)
    except InvalidInput as error:
        yield Refusal(f"{path}.deletes.schedule", error.message.removeprefix("frequency: "))


def _filter(selected: SelectedStream) -> Filter | None:
    if given := selected.filter_config:
        from_config = filter_of(given.logical_operator, given.conditions)
        if from_config is not None:
            return from_config
    return parse_filter(selected.filter)


def _of_filter(selected: SelectedStream, stream: CatalogStream, path: str, can: Capabilities) -> Iterator[Refusal]:
    as_object = bool(selected.filter_config and selected.filter_config.conditions)
    field = f"{path}.filter_config" if as_object else f"{path}.filter"
    if as_object and selected.filter.strip():
        yield Refusal(f"{path}.filter", "filter and filter_config are both set: leave one of them out")
    try:
        row_filter = _filter(selected)
    except InvalidFilter as error:
        yield Refusal(f"{field}.{error.place}" if error.place else field, error.message)
        return
    if row_filter is None:
        return
    if not can.source.filters:
        yield Refusal(field, "the source can't filter rows")
    for index, column in enumerate(row_filter.columns):
        if stream.columns and column not in stream.columns:
            place = f"{field}.conditions[{index}].column" if as_object else field
            yield Refusal(place, f"the stream has no column {column!r}")


def _of_columns(selected: SelectedStream, stream: CatalogStream, path: str) -> Iterator[Refusal]:
    columns = (selected.selected_columns.columns if selected.selected_columns else None) or []
    for index, column in enumerate(columns):
        if column not in stream.columns:
            yield Refusal(f"{path}.selected_columns.columns[{index}]", f"the stream has no column {column!r}")
    for name, named in (("value_policies", list(selected.value_policies)), ("primary_key", selected.primary_key)):
        for index, column in enumerate(named):
            place = f"{path}.{name}.{column}" if name == "value_policies" else f"{path}.{name}[{index}]"
            if column not in stream.columns:
                yield Refusal(place, f"the stream has no column {column!r}")
            elif columns and column not in columns:
                yield Refusal(place, f"the column {column!r} is not selected")


def _of_stream(stream: CatalogStream, selected: SelectedStream, path: str, can: Capabilities) -> Iterator[Refusal]:
    mode = stream.sync_mode
    if mode not in (FULL_REFRESH, INCREMENTAL):
        yield Refusal(f"{path}.sync_mode", f"{mode} is not supported yet, only {FULL_REFRESH} and {INCREMENTAL} are")
    elif mode not in can.source.modes:
        yield Refusal(f"{path}.sync_mode", f"the source does not support {mode}")
    elif mode == INCREMENTAL:
        yield from _of_incremental(stream, selected, path, can)
    elif selected.deletes is not None:
        yield Refusal(f"{path}.sync_mode", f"deletes are for the mode {INCREMENTAL}: {FULL_REFRESH} replaces all rows")
    taken: dict[str, str] = {}
    for column in stream.columns:
        target = stream.renames.get(column, column)
        if (other := taken.setdefault(target, column)) != column:
            place = f"{path}.type_schema.properties.{column}.destination_column_name"
            yield Refusal(place, f"{other!r} is named {target!r} as well")


def _of_incremental(stream: CatalogStream, selected: SelectedStream, path: str, can: Capabilities) -> Iterator[Refusal]:
    known = stream.available_cursor_fields
    for cursor in stream.cursors:
        if stream.columns and cursor not in stream.columns:
            yield Refusal(f"{path}.cursor_field", f"the stream has no column {cursor!r}")
        elif known is not None and cursor not in known:
            yield Refusal(f"{path}.cursor_field", f"the column {cursor!r} can't be a cursor; {_some(known)} can")
    if not stream.cursors and not can.source.cursorless:
        yield Refusal(f"{path}.cursor_field", f"{INCREMENTAL} needs a cursor; {_some(known or [])} can be one")
    if not stream.cursors and selected.lag_seconds is not None:
        yield Refusal(f"{path}.cursor_field", "lag_seconds needs a cursor")
    if selected.append_mode:
        if selected.null_cursors == "always":
            yield Refusal(f"{path}.sync_mode", "null_cursors: always would append the same rows in every run")
        return
    if not can.destination.merges:
        yield Refusal(f"{path}.sync_mode", "the destination can't merge rows: select append_mode")
    key = selected.primary_key or stream.source_defined_primary_key
    if key is not None and not key:
        yield Refusal(
            f"{path}.sync_mode",
            "the stream has no primary key, by which rows are merged: name one with primary_key or select append_mode",
        )
    chosen = (selected.selected_columns.columns if selected.selected_columns else None) or []
    missing = [column for column in key or () if chosen and column not in chosen]
    if missing and not selected.primary_key:
        yield Refusal(f"{path}.sync_mode", f"the column {missing[0]!r} of the primary key is not selected")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) or "none of its columns"


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
