"""Configuration models and what is read off them: the JSON Schema that forms are drawn from, and the secret fields."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic.fields import FieldInfo

from libs.core.errors import InvalidInput
from libs.core.json import dump_json
from libs.core.validation import field_errors

Path = tuple[str, ...]
SEVERAL_LINES = "text/plain"
NamesAndValues = Annotated[dict[str, str], WithJsonSchema({"type": "object", "additionalProperties": True})]
"""OLake's page lets names be typed only where ``additionalProperties`` is true; a schema of the values prevents it."""


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


def one_choice(value: str, label: str, title: str, description: str) -> WithJsonSchema:
    """The schema of an object of which only one kind is supported so far, told by its ``type``.

    Args:
        value, label: the type, and its name in the form.
        title, description: of the object, and of its type.
    """
    kind = {
        "type": "string",
        "oneOf": [{"const": value, "title": label}],
        "default": value,
        "title": "Type",
        "description": description,
        "order": 1,
    }
    return WithJsonSchema({"type": "object", "title": title, "properties": {"type": kind}})


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
    """The model's JSON Schema with every reference inlined, fields in their order; ``title`` is the form's.

    Defaults of null are left out: no field of a form has this value.
    """
    schema = model.model_json_schema() | {"title": title}
    definitions = schema.pop("$defs", {})
    inlined: dict[str, Any] = _inline(schema, definitions)
    return inlined


def ui_schema(model: type[ConnectorConfig]) -> str:
    """The form's hints as JSON text: passwords, text areas, and fields without a choice, which are not drawn.

    A secret of several lines is drawn as a text area.
    """
    hints: dict[str, Any] = {}
    for widget, applies in (("password", _is_secret), ("textarea", _has_several_lines), ("hidden", _is_constant)):
        for path in sorted(_paths(model, applies)):
            place = hints
            for name in path:
                place = place.setdefault(name, {})
            place["ui:widget"] = widget
    return dump_json(hints)


def secret_fields(model: type[ConnectorConfig]) -> frozenset[Path]:
    """The paths of every secret in a configuration, in the nested and in the flat form."""
    paths = frozenset(_paths(model, _is_secret))
    if model.WRAPPER is None:
        return paths
    return paths | {path[1:] for path in paths if path[0] == model.WRAPPER}


def _paths(model: type[BaseModel], applies: Callable[[FieldInfo], bool]) -> Iterator[Path]:
    """The paths of the fields to which it applies."""
    for name, field in model.model_fields.items():
        if applies(field):
            yield (name,)
        for nested in _models_in(field.annotation):
            yield from ((name, *rest) for rest in _paths(nested, applies))


def _is_secret(field: FieldInfo) -> bool:
    return _has_mark(field, "writeOnly")


def _has_several_lines(field: FieldInfo) -> bool:
    return _has_mark(field, "contentMediaType")


def _has_mark(field: FieldInfo, mark: str) -> bool:
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get(mark))


def _is_constant(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    candidates = [annotation, *get_args(annotation)]
    return [item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)]


def _inline(node: Any, definitions: Mapping[str, Any]) -> Any:
    match node:
        case {"$ref": str(reference)}:
            rest = {key: value for key, value in node.items() if key != "$ref"}
            return _inline(definitions[reference.rsplit("/", 1)[-1]] | rest, definitions)
        case dict():
            kept = {key: value for key, value in node.items() if (key, value) != ("default", None)}
            return {key: _inline(value, definitions) for key, value in kept.items()}
        case list():
            return [_inline(item, definitions) for item in node]
        case _:
            return node
