"""From a job's stream catalog to the plans of its streams; what can't be honoured is refused by name. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from libs.connectors.protocol import ConnectorRefused, Policy, StreamName, StreamPlan, Target
from libs.core.json import parse_json
from libs.core.validation import field_errors

ModelT = TypeVar("ModelT", bound=BaseModel)


class _Loose(BaseModel):
    """Front ends add fields of their own, which mean nothing here."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class CatalogStream(_Loose):
    name: str
    namespace: str = ""
    sync_mode: str = "full_refresh"
    destination_database: str | None = None
    destination_table: str | None = None
    type_schema: dict[str, Any] | None = None


class CatalogEntry(_Loose):
    stream: CatalogStream


class SelectedColumns(_Loose):
    columns: list[str] | None = None
    sync_new_columns: bool = False


class SelectedStream(_Loose):
    """``value_policies``: by column, what to do with a value that the destination can't hold."""

    stream_name: str
    disabled: bool = False
    partition_regex: str | None = None
    filter: str | None = None
    filter_config: dict[str, Any] | None = None
    selected_columns: SelectedColumns | None = None
    value_policies: dict[str, Literal["fail", "null", "text"]] = Field(default_factory=dict)


class StreamsConfig(_Loose):
    selected_streams: dict[str, list[SelectedStream]] | None = None
    streams: list[CatalogEntry] | None = None


class AdvancedSettings(_Loose):
    """``verify``: compare both ends of every stream before it is committed."""

    verify: bool = False


def parse_streams_config(text: str) -> StreamsConfig:
    """Raises ``ConnectorRefused`` naming what is wrong with it."""
    return _parsed(StreamsConfig, text, "streams_config")


def parse_advanced_settings(text: str) -> AdvancedSettings:
    """Raises ``ConnectorRefused`` naming what is wrong with them."""
    return _parsed(AdvancedSettings, text, "advanced_settings")


def entries_of(discovered: Iterable[Mapping[str, Any]]) -> list[CatalogEntry]:
    """What a discovery found, as if the job had saved it."""
    return [CatalogEntry.model_validate(entry) for entry in discovered]


def plans_of(config: StreamsConfig, entries: Sequence[CatalogEntry]) -> list[StreamPlan]:
    """The plans of the selected streams, all of ``entries`` when none is selected, in the catalog's order.

    Raises:
        ConnectorRefused: a selected stream is not in the catalog, asks for what is not supported, or two streams go
            to one table.
    """
    known = {(entry.stream.namespace, entry.stream.name): entry.stream for entry in entries}
    chosen = {
        (namespace, selected.stream_name): selected
        for namespace, streams in (config.selected_streams or {}).items()
        for selected in streams
    }
    for namespace, name in chosen:
        if (namespace, name) not in known:
            raise ConnectorRefused(
                f"the selected stream {namespace}.{name} is not in the catalog", code="stream_unknown"
            )
    everything = {key: SelectedStream(stream_name=key[1]) for key in known}
    wanted = {key: chosen[key] for key in known if key in chosen} if chosen else everything
    plans = [_plan(known[key], selected) for key, selected in wanted.items() if not selected.disabled]
    _refuse_shared_targets(plans)
    return plans


def _plan(stream: CatalogStream, selected: SelectedStream) -> StreamPlan:
    name = StreamName(stream.namespace, stream.name)
    if stream.sync_mode != "full_refresh":
        raise _unsupported(name, f"the sync mode {stream.sync_mode} (only full_refresh is, so far)")
    if selected.filter or (selected.filter_config or {}).get("conditions"):
        raise _unsupported(name, "a filter")
    if selected.partition_regex:
        raise _unsupported(name, "partitioning (partition_regex)")
    properties = (stream.type_schema or {}).get("properties") or {}
    for column, described in properties.items():
        renamed = described.get("destination_column_name") if isinstance(described, Mapping) else None
        if renamed and renamed != column:
            raise _unsupported(name, f"another name for a column ({column} as {renamed})")
    columns, left_out = _columns(selected.selected_columns, properties)
    policies: dict[str, Policy] = dict(selected.value_policies)
    return StreamPlan(name, _target(stream), columns, left_out, policies)


def _columns(
    selected: SelectedColumns | None, properties: Mapping[str, Any]
) -> tuple[tuple[str, ...] | None, frozenset[str]]:
    if selected is None or not selected.columns:
        return None, frozenset()
    if selected.sync_new_columns:
        return None, frozenset(properties) - frozenset(selected.columns)
    return tuple(selected.columns), frozenset()


def _target(stream: CatalogStream) -> Target:
    """``prefix:namespace`` is the namespace ``prefix_namespace``."""
    namespace = (stream.destination_database or stream.namespace).replace(":", "_")
    return Target(namespace, stream.destination_table or stream.name)


def _refuse_shared_targets(plans: Sequence[StreamPlan]) -> None:
    owners: dict[Target, StreamName] = {}
    for plan in plans:
        other = owners.setdefault(plan.target, plan.stream)
        if other != plan.stream:
            message = f"the streams {other} and {plan.stream} both go to {plan.target}"
            raise ConnectorRefused(message, code="target_shared")


def _unsupported(stream: StreamName, what: str) -> ConnectorRefused:
    return ConnectorRefused(f"the stream {stream} asks for {what}, which is not supported", code="not_supported")


def _parsed(model: type[ModelT], text: str, subject: str) -> ModelT:
    value = parse_json(text.encode(), subject=subject) if text.strip() else None
    try:
        return model.model_validate(value or {})
    except ValidationError as error:
        first = field_errors(error, subject)[0]
        raise ConnectorRefused(f"{first.field}: {first.message}", code="validation_error") from None
