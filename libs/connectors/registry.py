"""Every connector by role and type. Importing this loads the configuration models alone; drivers load on opening."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, cast

from libs.connectors import form
from libs.connectors.parquet.config import ParquetConfig
from libs.connectors.postgres.config import PostgresDestinationConfig, PostgresSourceConfig
from libs.connectors.protocol import Destination, Source
from libs.contracts.capabilities import (
    FULL_REFRESH,
    INCREMENTAL,
    Capabilities,
    DestinationCapabilities,
    SourceCapabilities,
)
from libs.core.errors import FieldError, InvalidInput

Role = Literal["source", "destination"]


@dataclass(frozen=True, slots=True)
class Connector:
    """One entry.

    Args:
        name: the canonical type, such as ``postgres``.
        config: the model of its configuration.
        implementation: ``module:class`` of the ``Source`` or ``Destination``, imported when it is opened.
        can: what it can do; nothing beyond a full refresh unless it says so.
        aliases: other names that users know it by.
    """

    role: Role
    name: str
    title: str
    config: type[form.ConnectorConfig]
    implementation: str
    can: SourceCapabilities | DestinationCapabilities
    aliases: tuple[str, ...] = ()


CONNECTORS: tuple[Connector, ...] = (
    Connector(
        "source",
        "postgres",
        "PostgreSQL",
        PostgresSourceConfig,
        "libs.connectors.postgres.source:PostgresSource",
        SourceCapabilities(frozenset((FULL_REFRESH, INCREMENTAL)), cursorless=True, filters=True),
        ("postgresql",),
    ),
    Connector(
        "destination",
        "postgres",
        "PostgreSQL",
        PostgresDestinationConfig,
        "libs.connectors.postgres.destination:PostgresDestination",
        DestinationCapabilities(appends=True, merges=True, deletes=frozenset(("soft", "hard"))),
        ("postgresql",),
    ),
    Connector(
        "destination",
        "parquet",
        "Parquet files",
        ParquetConfig,
        "libs.connectors.parquet.destination:ParquetDestination",
        DestinationCapabilities(appends=True, merges=True, deletes=frozenset(("soft", "hard"))),
    ),
)
_BY_NAME = {(item.role, name): item for item in CONNECTORS for name in (item.name, *item.aliases)}


def types(role: Role) -> tuple[str, ...]:
    """The canonical types of a role."""
    return tuple(item.name for item in CONNECTORS if item.role == role)


def connector(role: Role, connector_type: str) -> Connector:
    """The entry of a type or alias, in any case; raises ``InvalidInput`` naming the known types."""
    found = _BY_NAME.get((role, connector_type.strip().lower()))
    if found is None:
        message = (
            f"{role}s of the type {connector_type[:100]!r} are not supported; supported are {', '.join(types(role))}"
        )
        refusal = FieldError("type", message, "unknown_type")
        raise InvalidInput(f"type: {message}", code=refusal.code, errors=[refusal])
    return found


def canonical_type(role: Role, connector_type: str) -> str:
    """``postgresql`` is ``postgres``; raises ``InvalidInput`` for an unknown type."""
    return connector(role, connector_type).name


def capabilities(source_type: str, destination_type: str) -> Capabilities:
    """What a job between connectors of these types can do."""
    source, destination = connector("source", source_type).can, connector("destination", destination_type).can
    assert isinstance(source, SourceCapabilities)
    assert isinstance(destination, DestinationCapabilities)
    return Capabilities(source, destination)


def spec(role: Role, connector_type: str) -> dict[str, Any]:
    """``{"jsonschema": object, "uischema": JSON text}``: what a form is drawn from."""
    entry = connector(role, connector_type)
    schema = form.json_schema(entry.config, f"{entry.title} {entry.role}")
    return {"jsonschema": schema, "uischema": form.ui_schema(entry.config)}


def parse_config(role: Role, connector_type: str, config: Mapping[str, Any]) -> form.ConnectorConfig:
    """The configuration as its model; raises ``InvalidInput`` naming every field at fault as ``config.<path>``."""
    return form.parse_config(connector(role, connector_type).config, config)


def secret_fields(role: Role, connector_type: str) -> frozenset[form.Path]:
    """The paths of the secrets in a configuration, such as ``("password",)`` and ``("ssl", "client_key")``."""
    return form.secret_fields(connector(role, connector_type).config)


def address_of(role: Role, connector_type: str, config: Mapping[str, Any]) -> str:
    """Where the configuration points (``host:port``, a path), whatever its secrets are; equal means the same place."""
    return parse_config(role, connector_type, config).address()


def open_source(connector_type: str, config: Mapping[str, Any]) -> Source:
    """The source with this configuration; nothing is connected before it is used."""
    return cast(Source, _open("source", connector_type, config))


def open_destination(
    connector_type: str, config: Mapping[str, Any], *, parquet_roots: Sequence[str] = ()
) -> Destination:
    """The destination with this configuration; nothing is connected before it is used.

    Args:
        parquet_roots: the directories below which files may be written; anywhere when empty.
    """
    limits = {"roots": parquet_roots} if canonical_type("destination", connector_type) == "parquet" else {}
    return cast(Destination, _open("destination", connector_type, config, **limits))


def _open(role: Role, connector_type: str, config: Mapping[str, Any], **limits: Any) -> Any:
    entry = connector(role, connector_type)
    module, name = entry.implementation.split(":")
    return getattr(import_module(module), name)(form.parse_config(entry.config, config), **limits)
