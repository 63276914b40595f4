"""The reference of all settings and a commented ``datasync.yaml``, generated from the settings classes."""

import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from libs.process.live import Live
from libs.process.setting_types import Seconds, seconds_of
from libs.process.settings_file import WITHOUT_EFFECT, YAML_SETTINGS

PATHS = {setting: path for path, setting in YAML_SETTINGS.items()}
HEAD = """\
# Settings

`datasync settings` generates this page from the code. A setting's value is its environment variable, or else its key in
`datasync.yaml`, or else its default. `--config FILE` or `DATASYNC_CONFIG` names another file. Invalid values and
unknown keys are reported at start, and the process exits with code 2. Durations are in seconds, or have a unit:
`500ms`, `30s`, `1h30m`. `datasync settings --sample` prints a commented `datasync.yaml`."""

_ARGUMENT = re.compile(r"^        (?=\S)([\w, ]+): (.*)")


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting.

    Args:
        readers: the services that read it, in the order of the table of services, or ``all``.
        default: as it would be written; empty if there is none.
        is_live: whether it may change while the services run.
        is_left_to_suite: whether the suite chooses a value if none is set.
    """

    name: str
    readers: tuple[str, ...]
    kind: str
    default: str
    about: str
    is_left_to_suite: bool
    is_live: bool

    @property
    def variable(self) -> str:
        return self.name.upper()


def settings_of(readers: dict[str, type[BaseSettings]]) -> list[Setting]:
    """Every setting once, in the order of its first appearance.

    Args:
        readers: the settings class of each service, and of the suite.
    """
    found: dict[str, list[str]] = {}
    fields: dict[str, tuple[type[BaseSettings], FieldInfo]] = {}
    for reader, settings in readers.items():
        for name, field in settings.model_fields.items():
            found.setdefault(name, []).append(reader)
            fields.setdefault(name, (settings, field))
    return [
        Setting(
            name,
            ("all",) if set(who) >= set(readers) - {"suite"} else tuple(who),
            _kind_of(fields[name][1]),
            _default_of([readers[reader].model_fields[name] for reader in who], who),
            fields[name][1].description or about_of(fields[name][0]).get(name, ""),
            "suite" in who and not _text_of(readers["suite"].model_fields[name]),
            get_origin(fields[name][1].annotation) is Live,
        )
        for name, who in found.items()
    ]


def about_of(settings: type[BaseSettings]) -> dict[str, str]:
    """The descriptions of a class's settings in its docstring and in those of the classes that it extends."""
    about: dict[str, str] = {}
    for cls in reversed(settings.__mro__):
        names: list[str] = []
        for line in (cls.__doc__ or "").splitlines() if issubclass(cls, BaseSettings) else ():
            if matched := _ARGUMENT.match(line):
                names = [name.strip() for name in matched[1].split(",")]
                about.update(dict.fromkeys(names, matched[2].strip()))
            elif line.startswith("            ") and names:
                about.update({name: f"{about[name]} {line.strip()}" for name in names})
            elif not line.strip():
                names = []
    return {name: text.replace("``", "`") for name, text in about.items()}


def markdown(settings: Sequence[Setting]) -> str:
    """The page ``docs/settings.md``."""
    lines = [
        *HEAD.splitlines(),
        "",
        "| environment | `datasync.yaml` | value | default | read by | may change while running | about |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        "| "
        + " | ".join(
            cell.replace("|", "\\|")
            for cell in (
                f"`{item.variable}`",
                f"`{PATHS[item.name]}`" if item.name in PATHS else "",
                item.kind,
                f"`{item.default}`" if item.default else "",
                ", ".join(item.readers),
                "yes" if item.is_live else "",
                item.about,
            )
        )
        + " |"
        for item in settings
    ]
    lines += [
        "",
        "These settings are accepted but not used yet. A warning is logged at start for each that is set:",
        "",
    ]
    lines += [f"- `{name.upper()}` (`{PATHS[name]}`): {why}" for name, why in WITHOUT_EFFECT.items()]
    return "\n".join([*lines, ""])


def sample(settings: Sequence[Setting]) -> str:
    """A ``datasync.yaml`` with every setting and its default, commented out."""
    by_name = {item.name: item for item in settings}
    lines = ["# Every setting of this file, with its default. Environment variables override them."]
    open_sections: tuple[str, ...] = ()
    for path, name in YAML_SETTINGS.items():
        *sections, key = path.split(".")
        for depth in range(_shared_length(open_sections, sections), len(sections)):
            lines += [""] if depth == 0 else []
            lines.append(f"#{'  ' * depth}{sections[depth]}:")
        open_sections = tuple(sections)
        indent = "  " * len(sections)
        item = by_name.get(name)
        about = item.about if item else WITHOUT_EFFECT[name]
        lines += [f"#{indent}# {line}" for line in _wrapped(about, 100)]
        lines.append(f"#{indent}{key}: {_yaml_default(item)}".rstrip())
    return "\n".join([*lines, ""])


def _shared_length(left: Sequence[str], right: Sequence[str]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _wrapped(text: str, width: int) -> Iterator[str]:
    line = ""
    for word in text.split():
        if line and len(line) + len(word) >= width:
            yield line
            line = ""
        line = f"{line} {word}".strip()
    if line:
        yield line


def _yaml_default(item: Setting | None) -> str:
    default = "" if item is None or item.is_left_to_suite else item.default
    if ", gateway " in default:
        # server.host and server.port of the file are the gateway's.
        default = default.split(", gateway ")[1].split(",")[0]
    return default if re.fullmatch(r"[\w./]*", default) else f'"{default}"'


def _default_of(fields: Sequence[FieldInfo], readers: Sequence[str]) -> str:
    texts = {reader: text for reader, field in zip(readers, fields, strict=True) if (text := _text_of(field))}
    if len(set(texts.values())) <= 1:
        return next(iter(texts.values()), "")
    return ", ".join(f"{reader} {text}" for reader, text in texts.items())


def _text_of(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    default = field.get_default(call_default_factory=True)
    return _written(default.value if isinstance(default, Live) else default)


def _written(value: Any) -> str:
    """A value as it would be written."""
    match value:
        case None | () | {} | "":
            return ""
        case True | False:
            return str(value).lower()
        case SecretStr():
            return ""
        case tuple():
            return ",".join(str(item) for item in value)
        case float() if value.is_integer():
            return str(int(value))
        case _:
            return str(value)


def _kind_of(field: FieldInfo) -> str:
    """The valid values, in words."""
    annotation, metadata = _parts_of(field.annotation)
    metadata += field.metadata
    kind = _name_of(annotation)
    if any(getattr(item, "func", None) is seconds_of for item in metadata):
        kind = "duration"
    bounds = [
        f"{sign} {bound:g}"
        for item in metadata
        for sign, type_, attribute in (("≥", Ge, "ge"), (">", Gt, "gt"), ("≤", Le, "le"), ("<", Lt, "lt"))
        if isinstance(item, type_) and isinstance(bound := getattr(item, attribute), int | float)
    ]
    if len([bound for bound in bounds if bound[0] in "≥>"]) > 1:
        bounds.remove("≥ 0")
    return f"{kind} {', '.join(dict.fromkeys(bounds))}".strip()


def _parts_of(annotation: Any) -> tuple[Any, list[Any]]:
    """A type without its annotations, and the annotations."""
    if get_origin(annotation) is Live:
        (annotation,) = get_args(annotation)
    if get_origin(annotation) is not Annotated:
        return annotation, []
    inner, *metadata = get_args(annotation)
    return inner, list(
        chain.from_iterable(item.metadata if isinstance(item, FieldInfo) else (item,) for item in metadata)
    )


def _name_of(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation == Seconds:
        return "duration"
    if origin is Annotated:
        return _name_of(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{item}`" for item in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_name_of(item) for item in arguments if item is not type(None)))
    if origin is tuple:
        return "list"
    if origin is dict:
        return "JSON object"
    named = {int: "integer", float: "number", bool: "`true`, `false`", SecretStr: "secret text", Path: "path"}
    return named.get(annotation, "text")
