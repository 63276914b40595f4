"""The folder of a table: no two tables share one, none is hidden from readers, none is outside the directory."""

from collections.abc import Container
from urllib.parse import quote

from libs.connectors.protocol import ConnectorRefused, Target

FOLDER = "_datasync"
_SAFE = " !#$&'()+,;@[]{}~"
_BYTES_MAX = 200


def table_path(target: Target, published: Container[str]) -> str:
    """``namespace/table`` below the destination's directory.

    Args:
        published: the paths of the published tables; a table keeps the name that an earlier version gave its folder.
    """
    earlier = "/".join(_earlier_name(name) for name in (target.namespace, target.table))
    return earlier if earlier in published else "/".join(_name(name) for name in (target.namespace, target.table))


def _name(name: str) -> str:
    """Encode names that scanners skip (``_x``) or take for a partition (``a=b``)."""
    encoded = quote(name, safe=_SAFE, encoding="utf-8") if not name.isalnum() else name
    return _short_enough(name, _first_encoded(encoded) if encoded.startswith((".", "_")) else encoded)


def _earlier_name(name: str) -> str:
    encoded = quote(name, safe=f"{_SAFE}=", encoding="utf-8") if not name.isalnum() else name
    return _short_enough(name, _first_encoded(encoded) if encoded.startswith((".", FOLDER)) else encoded)


def _first_encoded(name: str) -> str:
    return f"%{ord(name[0]):02X}{name[1:]}"


def _short_enough(name: str, encoded: str) -> str:
    if len(encoded.encode()) > _BYTES_MAX:
        raise ConnectorRefused(
            f"the name {name!r} is too long for a folder: choose another destination table or database"
        )
    return encoded
