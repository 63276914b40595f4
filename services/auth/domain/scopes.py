"""What a credential of a program may be allowed: scopes named ``<resource>:<right>``."""

from collections.abc import Sequence
from typing import Literal

from libs.core.errors import FieldError, InvalidInput
from libs.core.scopes import ALL_SCOPES, READ_SCOPES, SCOPES

Permission = Literal["read-only", "read-write"]


def granted_scopes(permission: Permission, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The scopes that a credential gets: those wanted, or all that its permission allows where None are named.

    A read-only one never holds ``*`` nor a ``:write`` scope, so that the scopes alone tell what it may do.

    Raises:
        InvalidInput: an unknown scope, or one that a read-only credential can't hold.
    """
    allowed = READ_SCOPES if permission == "read-only" else (ALL_SCOPES, *SCOPES)
    if wanted is None:
        return READ_SCOPES if permission == "read-only" else (ALL_SCOPES,)
    for index, scope in enumerate(wanted):
        if scope not in (ALL_SCOPES, *SCOPES):
            raise _invalid_scope(index, f"{scope[:64]!r} is not a scope; the scopes are {', '.join(SCOPES)}")
        if scope not in allowed:
            raise _invalid_scope(index, f"a read-only key can't hold the scope {scope}")
    return tuple(dict.fromkeys(wanted))


def _invalid_scope(index: int, message: str) -> InvalidInput:
    field = f"scopes[{index}]"
    return InvalidInput(f"{field}: {message}", errors=[FieldError(field, message, "invalid_scope")])
