"""What a job asks of its streams, as OLake's catalog says it; checked when a job is made and again when it runs.

Fields that would change the data in OLake and are not supported here are refused. An unknown field of the choice is
refused where a job is made, and ignored where it runs; those of discovered streams are always ignored.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool

StreamKey = tuple[str, str]
FULL_REFRESH = "full_refresh"


def _or(default: Any) -> BeforeValidator:
    """Front ends send null or an empty text for fields that are not set."""
    return BeforeValidator(lambda value: default if value in (None, "") else value)


class _Loose(BaseModel):
    """Stored jobs may have fields that this version does not know."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class TypeSchema(_Loose):
    properties: dict[str, Any] | None = None


class CatalogStream(_Loose):
    name: str
    namespace: Annotated[str, _or("")] = ""
    sync_mode: Annotated[str, _or(FULL_REFRESH)] = FULL_REFRESH
    destination_database: str | None = Field(
        default=None,
        description="The namespace that it goes to, such as a schema; the source's where left out.",
        examples=["lake:public"],
    )
    destination_table: str | None = Field(
        default=None, description="The table that it goes to; of the stream's name where left out.", examples=["orders"]
    )
    type_schema: TypeSchema | None = None

    @property
    def key(self) -> StreamKey:
        return self.namespace, self.name

    @property
    def columns(self) -> Mapping[str, Any]:
        """By name; empty where the catalog does not tell them."""
        return (self.type_schema.properties if self.type_schema else None) or {}

    @property
    def target(self) -> tuple[str, str]:
        """Where it goes, a namespace and a table; ``prefix:namespace`` is the namespace ``prefix_namespace``."""
        namespace = (self.destination_database or self.namespace).replace(":", "_")
        return namespace, self.destination_table or self.name


class CatalogEntry(_Loose):
    stream: CatalogStream


class SelectedColumns(_Loose):
    columns: list[str] | None = Field(
        default=None, description="The columns to move; all where left out.", examples=[["id", "placed_at"]]
    )
    sync_new_columns: Annotated[bool, _or(False)] = Field(
        default=False, description="Columns that the catalog does not have yet are moved as well."
    )


class FilterConfig(_Loose):
    logical_operator: Any = None
    conditions: list[Any] | None = None


class SelectedStream(_Loose):
    """A stream to move. Fields that choose what is not supported yet are refused."""

    stream_name: str = Field(examples=["orders"])
    disabled: Annotated[bool, _or(False)] = Field(default=False, description="The stream is left out.")
    append_mode: Annotated[bool, _or(False)] = False
    normalization: Annotated[bool, _or(True)] = True
    partition_regex: str | None = None
    filter: Any = None
    filter_config: FilterConfig | None = None
    chunk_column: str | None = None
    split_column: str | None = None
    selected_columns: SelectedColumns | None = None
    value_policies: Annotated[dict[str, Literal["fail", "null", "text"]], _or({})] = Field(
        default_factory=dict,
        description="By column, what becomes of a value that the destination can't hold: the stream fails, the value "
        "becomes null, or the whole column becomes text.",
        examples=[{"born": "null"}],
    )


class StreamsConfig(_Loose):
    """A job's ``streams_config``: without a selected stream all of ``streams``, without those all that there are."""

    selected_streams: Annotated[dict[str, Annotated[list[SelectedStream], _or([])]], _or({})] = Field(
        default_factory=dict
    )
    streams: Annotated[list[CatalogEntry], _or([])] = Field(default_factory=list)


class AdvancedSettings(_Loose):
    """A job's ``advanced_settings``."""

    max_discover_threads: Annotated[int, Field(strict=True, ge=1, le=1000)] | None = Field(
        default=None, description="An upper bound on the connections of a discovery, which uses one."
    )
    verify: Annotated[StrictBool, _or(False)] = Field(
        default=False,
        description="Both ends hash all rows of each stream and are compared before it is committed, which costs each "
        "server about twice what reading the rows costs.",
    )
    take_over: Annotated[StrictBool, _or(False)] = Field(
        default=False, description="The job may write the tables of this project's deleted jobs."
    )


# A discovery's answer holds the catalog a second time under this name, and may be sent as it is.
_ALSO_SENT: Mapping[type[BaseModel], tuple[str, ...]] = {StreamsConfig: ("streams_config",)}


@dataclass(frozen=True, slots=True)
class Refusal:
    """``field`` is a path in the configuration, such as ``selected_streams.public[0].filter``; empty for none."""

    field: str
    message: str


@dataclass(frozen=True, slots=True)
class ChosenStream:
    """A stream that a job moves, and what of its selection is not supported."""

    stream: CatalogStream
    selected: SelectedStream
    refusals: tuple[Refusal, ...] = ()


def chosen_streams(config: StreamsConfig, entries: Sequence[CatalogEntry]) -> list[ChosenStream]:
    """The streams that a job moves in the catalog's order, then those that it selects and the catalog does not have.

    Args:
        entries: the job's own ``streams``, or what was discovered where it has none.
    """
    known = {entry.stream.key: (f"streams[{index}].stream", entry.stream) for index, entry in enumerate(entries)}
    selections = list(_selections(config))
    chosen: list[ChosenStream] = []
    if selections:
        order = {key: place for place, key in enumerate(known)}
        selections.sort(key=lambda item: order.get(item[0], len(order)))
        twice = _repeated(key for key, _, _ in selections)
        for key, path, selected in selections:
            if selected.disabled:
                continue
            place, stream = known.get(key, ("", CatalogStream(name=key[1], namespace=key[0])))
            found = list(_of_choice(selected, stream, path))
            if not place:
                found.append(_missing(key, path, is_discovered=not config.streams))
            elif key in twice:
                found.append(Refusal(f"{path}.stream_name", "is selected twice"))
            else:
                found += _of_stream(stream, place)
            chosen.append(ChosenStream(stream, selected, tuple(found)))
    else:
        for place, stream in known.values():
            chosen.append(
                ChosenStream(stream, SelectedStream(stream_name=stream.name), tuple(_of_stream(stream, place)))
            )
    return _with_shared_targets(chosen, {key: place for key, (place, _) in known.items()})


def refusals(config: StreamsConfig) -> list[Refusal]:
    """What is not supported in a configuration, without a look at the source."""
    found = []
    if config.streams:
        chosen = chosen_streams(config, config.streams)
        twice = _repeated(entry.stream.key for entry in config.streams)
        found += [
            Refusal(f"streams[{index}].stream.name", "stands twice in the catalog")
            for index, entry in enumerate(config.streams)
            if entry.stream.key in twice
        ]
        found += [refusal for item in chosen for refusal in item.refusals]
    else:
        twice = _repeated(key for key, _, _ in _selections(config))
        for key, path, selected in _selections(config):
            found += _of_choice(selected, CatalogStream(name=key[1], namespace=key[0]), path)
            if key in twice:
                found.append(Refusal(f"{path}.stream_name", "is selected twice"))
    selections = [selected for _, _, selected in _selections(config)]
    if selections and all(selected.disabled for selected in selections):
        found.append(Refusal("selected_streams", "has no stream that is not disabled"))
    return found


def unknown_fields(model: type[BaseModel], value: Any, path: str = "") -> Iterator[Refusal]:
    """The fields of ``value``, an object, that its model does not know, each with a similar one that it does."""
    if not isinstance(value, Mapping):
        return
    known = {*model.model_fields, *_ALSO_SENT.get(model, ())}
    for name in value:
        if name not in known:
            near = _similar(name, sorted(model.model_fields))
            hint = f"; did you mean {near}?" if near else ""
            yield Refusal(f"{path}.{name}" if path else name, f"is not a known field{hint}")


def _similar(name: str, known: Sequence[str]) -> str | None:
    """A known name that ends in this one, such as ``selected_columns`` for ``columns``, or else a close one."""
    longer = [one for one in known if one.endswith(f"_{name}")]
    return next(iter(longer or difflib.get_close_matches(name, known, n=1)), None)


def unknown_fields_of_choice(config: Mapping[str, Any]) -> Iterator[Refusal]:
    """The unknown fields of a ``streams_config`` as it was sent, its shape checked; discovered streams may have any."""
    yield from unknown_fields(StreamsConfig, config)
    for namespace, streams in (config.get("selected_streams") or {}).items():
        for index, selected in enumerate(streams or ()):
            path = f"selected_streams.{namespace}[{index}]"
            yield from unknown_fields(SelectedStream, selected, path)
            yield from unknown_fields(SelectedColumns, selected.get("selected_columns"), f"{path}.selected_columns")
            yield from unknown_fields(FilterConfig, selected.get("filter_config"), f"{path}.filter_config")


def _missing(key: StreamKey, path: str, *, is_discovered: bool) -> Refusal:
    if is_discovered:
        return Refusal("", f"the source has no table {_dotted(key)}, or the role may not read it")
    return Refusal(f"{path}.stream_name", "is not one of the catalog's streams")


def _selections(config: StreamsConfig) -> Iterator[tuple[StreamKey, str, SelectedStream]]:
    for namespace, streams in config.selected_streams.items():
        for index, selected in enumerate(streams):
            yield (namespace, selected.stream_name), f"selected_streams.{namespace}[{index}]", selected


def _repeated(keys: Iterator[StreamKey]) -> set[StreamKey]:
    seen: set[StreamKey] = set()
    return {key for key in keys if key in seen or seen.add(key)}  # type: ignore[func-returns-value]


_NOT_HONOURED: tuple[tuple[str, Callable[[SelectedStream], Any], str], ...] = (
    ("append_mode", lambda selected: selected.append_mode, "appending is not supported: each run replaces the table"),
    (
        "normalization",
        lambda selected: not selected.normalization,
        "false is not supported: each column of the source is a column of the destination",
    ),
    ("partition_regex", lambda selected: selected.partition_regex, "partitioning is not supported"),
    ("filter", lambda selected: selected.filter, "a filter is not supported"),
    (
        "filter_config",
        lambda selected: selected.filter_config and selected.filter_config.conditions,
        "a filter is not supported",
    ),
    ("chunk_column", lambda selected: selected.chunk_column, "choosing the column to cut by is not supported"),
    ("split_column", lambda selected: selected.split_column, "choosing the column to cut by is not supported"),
)


def _of_choice(selected: SelectedStream, stream: CatalogStream, path: str) -> Iterator[Refusal]:
    if selected.disabled:
        return
    for name, asks, message in _NOT_HONOURED:
        if asks(selected):
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
        yield Refusal(f"{path}.sync_mode", f"{stream.sync_mode} is not supported; only {FULL_REFRESH} is, so far")
    for column, described in stream.columns.items():
        renamed = described.get("destination_column_name") if isinstance(described, Mapping) else None
        if renamed and renamed != column:
            place = f"{path}.type_schema.properties.{column}.destination_column_name"
            yield Refusal(place, f"another name for a column is not supported ({column} as {renamed})")


def _with_shared_targets(chosen: list[ChosenStream], places: Mapping[StreamKey, str]) -> list[ChosenStream]:
    """Refuse every stream that shares its target with another one."""
    by_target: dict[tuple[str, str], list[ChosenStream]] = {}
    for item in chosen:
        by_target.setdefault(item.stream.target, []).append(item)
    marked = []
    for item in chosen:
        others = [other.stream for other in by_target[item.stream.target] if other.stream.key != item.stream.key]
        if others and (place := places.get(item.stream.key)):
            message = f"{_dotted(others[0].key)} goes to {_dotted(item.stream.target)} as well"
            item = ChosenStream(
                item.stream, item.selected, (*item.refusals, Refusal(f"{place}.destination_table", message))
            )
        marked.append(item)
    return marked


def _dotted(name: StreamKey) -> str:
    return ".".join(filter(None, name))
