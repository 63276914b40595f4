"""The plans for a run's streams, from its catalog. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from libs.connectors.protocol import ConnectorRefused, StreamName, StreamPlan, Target
from libs.contracts.streams import CatalogEntry, ChosenStream, SelectedStream, StreamsConfig, chosen_streams


@dataclass(frozen=True, slots=True)
class Wanted:
    """A stream of a run; ``refusal`` says why it cannot be moved."""

    plan: StreamPlan
    refusal: ConnectorRefused | None = None


def entries_of(discovered: Iterable[Mapping[str, Any]]) -> list[CatalogEntry]:
    """The discovered streams, as a job's catalog has them."""
    return [CatalogEntry.model_validate(entry) for entry in discovered]


def wanted_streams(config: StreamsConfig, entries: Sequence[CatalogEntry]) -> list[Wanted]:
    """The selected streams in the catalog's order, or all of ``entries`` if none is selected.

    Raises:
        ConnectorRefused: there is no stream at all.
    """
    chosen = chosen_streams(config, entries)
    if chosen:
        return [_wanted(item) for item in chosen]
    if entries:
        raise ConnectorRefused("no stream is selected: every selected one is disabled", code="no_streams")
    raise ConnectorRefused(
        "the source shows no stream: there is no table that its role may read (it needs USAGE on the schema and SELECT "
        "on the table), or none in the chosen schemas",
        code="no_streams",
    )


def _wanted(item: ChosenStream) -> Wanted:
    name = StreamName(item.stream.namespace, item.stream.name)
    columns, left_out = _columns(item.selected, item.stream.columns)
    plan = StreamPlan(name, Target(*item.stream.target), columns, left_out, dict(item.selected.value_policies))
    if not item.refusals:
        return Wanted(plan)
    words = "; ".join(
        f"streams_config.{refusal.field}: {refusal.message}" if refusal.field else refusal.message
        for refusal in item.refusals
    )
    return Wanted(plan, ConnectorRefused(f"{name}: {words}", code="not_supported"))


def _columns(selected: SelectedStream, known: Mapping[str, Any]) -> tuple[tuple[str, ...] | None, frozenset[str]]:
    choice = selected.selected_columns
    if choice is None or not choice.columns:
        return None, frozenset()
    if choice.sync_new_columns:
        return None, frozenset(known) - frozenset(choice.columns)
    return tuple(choice.columns), frozenset()
