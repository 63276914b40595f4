"""Reconciles a stream's columns with its target's, by the stream's policy. Pure; shared by all destinations."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from libs.connectors.protocol import ConnectorRefused, SchemaPolicy, StreamName

ChangeKind = Literal["added", "dropped", "widened", "changed"]


@dataclass(frozen=True, slots=True)
class SchemaChange:
    """A column of the target that changes.

    Args:
        kind: a column is added; dropped at the source, and null in new rows; widened to a type that holds all former
            values; changed to any other type, which only happens when all rows are replaced.
        before, after: the types as the destination writes them; None where there is no such column.
    """

    column: str
    kind: ChangeKind
    before: str | None
    after: str | None

    def __str__(self) -> str:
        match self.kind:
            case "added":
                return f"column {self.column} ({self.after}) is new"
            case "dropped":
                return f"column {self.column} ({self.before}) no longer exists at the source"
            case _:
                return f"column {self.column} changes from {self.before} to {self.after}"


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What has to be done.

    Args:
        left_out: columns of the stream that the target does not take.
    """

    changes: tuple[SchemaChange, ...] = ()
    left_out: frozenset[str] = frozenset()


class SchemaChanged(ConnectorRefused):
    """The source's columns changed in a way that the stream's policy does not allow."""

    default_code = "schema_changed"


def reconcile(
    stream: StreamName,
    *,
    present: Mapping[str, str],
    wanted: Mapping[str, str],
    policy: SchemaPolicy,
    widens: Callable[[str, str], bool],
    replaced: bool = False,
) -> Reconciled:
    """Compare the columns that earlier runs wrote with those that the stream has now.

    Args:
        present: the target's columns that DataSync wrote, with their types.
        wanted: the stream's columns, with the types that they have at the destination.
        widens: whether the second type holds every value of the first.
        replaced: all rows are replaced, so that the target can take any column.

    Raises:
        SchemaChanged: names the first column that the policy does not allow.
    """
    added = [SchemaChange(name, "added", None, kind) for name, kind in wanted.items() if name not in present]
    dropped = [SchemaChange(name, "dropped", kind, None) for name, kind in present.items() if name not in wanted]
    retyped = [
        SchemaChange(name, "widened" if widens(present[name], kind) else "changed", present[name], kind)
        for name, kind in wanted.items()
        if name in present and present[name] != kind
    ]
    if policy == "freeze" and (changes := [*added, *dropped, *retyped]):
        raise SchemaChanged(
            f"{stream}: {changes[0]}, and the stream's schema_policy is freeze: set it to evolve, or undo the change"
        )
    if policy == "ignore" and retyped:
        raise SchemaChanged(
            f"{stream}: {retyped[0]}, and the stream's schema_policy is ignore, which only moves columns as they are: "
            "set it to evolve, or leave the column out"
        )
    refused = [change for change in retyped if change.kind == "changed" and not replaced]
    if refused:
        raise SchemaChanged(
            f"{stream}: {refused[0]}, which does not hold every former value: clear the stream's destination to load "
            "it again, or leave the column out"
        )
    if policy == "ignore":
        return Reconciled((), frozenset(change.column for change in added))
    return Reconciled((*added, *retyped, *dropped))
