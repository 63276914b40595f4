"""The plans for a run's streams, from its catalog. Pure."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from libs.connectors.protocol import ConnectorRefused, Disposition, StreamName, StreamPlan, Target
from libs.contracts.capabilities import INCREMENTAL, Capabilities
from libs.contracts.streams import (
    EVERY_RUN,
    AdvancedSettings,
    CatalogEntry,
    ChosenStream,
    SelectedStream,
    StreamsConfig,
    chosen_streams,
)
from libs.core.schedule import parse_frequency


@dataclass(frozen=True, slots=True)
class Wanted:
    """A stream of a run.

    Args:
        refusal: why it cannot be moved.
        compare_keys: the cron expression of when rows are looked for that the source deleted; empty for every run.
    """

    plan: StreamPlan
    refusal: ConnectorRefused | None = None
    compare_keys: str = ""


def entries_of(discovered: Iterable[Mapping[str, Any]]) -> list[CatalogEntry]:
    """The discovered streams, as a job's catalog has them."""
    return [CatalogEntry.model_validate(entry) for entry in discovered]


def wanted_streams(
    config: StreamsConfig, entries: Sequence[CatalogEntry], settings: AdvancedSettings, can: Capabilities
) -> list[Wanted]:
    """The selected streams in the catalog's order, or all of ``entries`` if none is selected.

    Raises:
        ConnectorRefused: there is no stream at all.
    """
    chosen = chosen_streams(config, entries, can)
    if chosen:
        return [_wanted(item, settings) for item in chosen]
    if entries:
        raise ConnectorRefused("no stream is selected: every selected one is disabled", code="no_streams")
    raise ConnectorRefused(
        "the source shows no stream: there is no table that its role may read (it needs USAGE on the schema and SELECT "
        "on the table), or none in the chosen schemas",
        code="no_streams",
    )


def _wanted(item: ChosenStream, settings: AdvancedSettings) -> Wanted:
    name = StreamName(item.stream.namespace, item.stream.name)
    plan = _plan(name, item, settings)
    schedule = item.selected.deletes.schedule if item.selected.deletes else EVERY_RUN
    if not item.refusals:
        return Wanted(plan, compare_keys="" if schedule.lower() == EVERY_RUN else parse_frequency(schedule))
    words = "; ".join(
        f"streams_config.{refusal.field}: {refusal.message}" if refusal.field else refusal.message
        for refusal in item.refusals
    )
    return Wanted(plan, ConnectorRefused(f"{name}: {words}", code="not_supported"))


def _plan(name: StreamName, item: ChosenStream, settings: AdvancedSettings) -> StreamPlan:
    stream, selected = item.stream, item.selected
    columns, left_out = _columns(selected, stream.columns)
    incremental = stream.sync_mode == INCREMENTAL
    rows: Disposition = "append" if selected.append_mode else "merge" if incremental else "replace"
    cursors = stream.cursors if incremental else ()
    return StreamPlan(
        name,
        Target(*stream.target),
        columns,
        left_out,
        dict(selected.value_policies),
        renames=stream.renames,
        mode="incremental" if incremental else "full_refresh",
        disposition=rows,
        cursor=cursors[0] if cursors else None,
        cursor_fallback=cursors[1] if len(cursors) > 1 else None,
        lag_seconds=selected.lag_seconds,
        nulls=selected.null_cursors,
        key=tuple(selected.primary_key),
        row_filter=item.row_filter,
        schema_policy=selected.schema_policy or settings.schema_policy,
        deletes=selected.deletes.mode if selected.deletes and incremental else None,
        partition=selected.partition_regex or None,
    )


def settings_of(plan: StreamPlan) -> str:
    """A digest of what a stream's rows depend on; a state of other settings does not tell what has been read."""
    chosen = (plan.columns, sorted(plan.left_out), sorted(plan.policies.items()), sorted(plan.renames.items()))
    rows = (repr(plan.row_filter), plan.nulls, plan.key, plan.disposition, plan.partition)
    return hashlib.sha256(repr((chosen, rows)).encode()).hexdigest()[:16]


def _columns(selected: SelectedStream, known: Mapping[str, Any]) -> tuple[tuple[str, ...] | None, frozenset[str]]:
    choice = selected.selected_columns
    if choice is None or not choice.columns:
        return None, frozenset()
    if choice.sync_new_columns:
        return None, frozenset(known) - frozenset(choice.columns)
    return tuple(choice.columns), frozenset()
