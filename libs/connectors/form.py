"""Configuration models and what is read off them: the JSON Schema that forms are drawn from, and the secret fields."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from libs.core.errors import InvalidInput
from libs.core.json import dump_json
from libs.core.validation import field_errors

Path = tuple[str, ...]
SEVERAL_LINES = "text/plain"


class ConnectorConfig(BaseModel):
    """The parent of every connector's configuration.

    Class attributes:
        WRAPPER: the field that holds the settings where a system's users nest them (``writer``); the flat form is
            accepted beside it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)
    WRAPPER: ClassVar[str | None] = None

    def address(self) -> str:
        """Where the data goes: two configurations with one address reach the same place."""
        raise NotImplementedError


def form_field(
    title: str,
    description: str,
    order: int,
    *,
    default: Any = ...,
    secret: bool = False,
    several_lines: bool = False,
    **constraints: Any,
) -> Any:
    """A field of the form.

    Args:
        title: its label.
        description: its help text.
        order: its place.
        secret: it is drawn as a password, and never returned.
        several_lines: it is drawn as a text area.
    """
    extra: dict[str, Any] = {"order": order}
    if secret:
        extra |= {"format": "password", "writeOnly": True}
    if several_lines:
        extra |= {"contentMediaType": SEVERAL_LINES}
    return Field(default, title=title, description=description, json_schema_extra=extra, **constraints)


def one_choice(name: str, title: str, description: str) -> WithJsonSchema:
    """The schema of an object of which only one kind is supported so far, told by its ``type``."""
    kind = {"type": "string", "enum": [name], "default": name, "title": "Type", "description": description, "order": 1}
    return WithJsonSchema({"type": "object", "title": title, "properties": {"type": kind}, "default": {"type": name}})


def parse_config(model: type[ConnectorConfig], config: Mapping[str, Any]) -> ConnectorConfig:
    """The configuration as its model.

    Raises:
        InvalidInput: naming every field that is missing, unknown or wrong, as ``config.<path>``.
    """
    try:
        return model.model_validate(dict(config))
    except ValidationError as error:
        errors = field_errors(error, "config")
    if model.WRAPPER is not None and model.WRAPPER not in config:
        # The flat form was sent, and is what the paths have to fit.
        nested = f"config.{model.WRAPPER}."
        errors = [replace(item, field=item.field.replace(nested, "config.", 1)) for item in errors]
    raise InvalidInput("; ".join(f"{item.field}: {item.message}" for item in errors), errors=errors)


def json_schema(model: type[ConnectorConfig], title: str) -> dict[str, Any]:
    """The model's JSON Schema with every reference inlined, fields in their order; ``title`` is the form's."""
    schema = model.model_json_schema() | {"title": title}
    definitions = schema.pop("$defs", {})
    inlined: dict[str, Any] = _inline(schema, definitions)
    return inlined


def ui_schema(model: type[ConnectorConfig]) -> str:
    """The form's hints as JSON text: secrets are password fields; texts of several lines, secret or not, text areas."""
    hints: dict[str, Any] = {}
    marked = [("password", _paths_with(model, "writeOnly")), ("textarea", _paths_with(model, "contentMediaType"))]
    for widget, paths in marked:
        for path in sorted(paths):
            place = hints
            for name in path:
                place = place.setdefault(name, {})
            place["ui:widget"] = widget
    return dump_json(hints)


def secret_fields(model: type[ConnectorConfig]) -> frozenset[Path]:
    """The paths of every secret in a configuration, in the nested and in the flat form."""
    paths = frozenset(_paths_with(model, "writeOnly"))
    if model.WRAPPER is None:
        return paths
    return paths | {path[1:] for path in paths if path[0] == model.WRAPPER}


def _paths_with(model: type[BaseModel], mark: str) -> Iterator[Path]:
    """The paths of the fields whose schema has this mark."""
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get(mark):
            yield (name,)
        for nested in _models_in(field.annotation):
            yield from ((name, *rest) for rest in _paths_with(nested, mark))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    candidates = [annotation, *get_args(annotation)]
    return [item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)]


def _inline(node: Any, definitions: Mapping[str, Any]) -> Any:
    match node:
        case {"$ref": str(reference)}:
            rest = {key: value for key, value in node.items() if key != "$ref"}
            return _inline(definitions[reference.rsplit("/", 1)[-1]] | rest, definitions)
        case dict():
            return {key: _inline(value, definitions) for key, value in node.items()}
        case list():
            return [_inline(item, definitions) for item in node]
        case _:
            return node
