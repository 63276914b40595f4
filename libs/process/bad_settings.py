"""What is wrong with the settings, for people."""

import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_settings import SettingsError

from libs.process.settings_file import CONFIG_DEFAULT, YAML_SETTINGS, BadSettings, config_path


def describe_bad_settings(error: Exception) -> str:
    """One line per bad setting, with its environment variable and without its value."""
    match error:
        case ValidationError():
            names = dict.fromkeys(_setting_of(item) for item in error.errors())
            return "\n".join(
                _describe(name, [item for item in error.errors() if _setting_of(item) == name]) for name in names
            )
        case SettingsError() if matched := re.search(r'field "(\w+)"', str(error)):
            return f"  {matched[1].upper()}: is not valid JSON"
        case BadSettings():
            return f"  {config_path()}: {error}"
        case _:
            return f"  {error}"


def _setting_of(item: Any) -> str:
    return str(item["loc"][0]) if item["loc"] else ""


def _describe(name: str, items: Sequence[Any]) -> str:
    paths = [path for path, setting in YAML_SETTINGS.items() if setting == name]
    where = f" (in {CONFIG_DEFAULT}: {paths[0]})" if paths else ""
    # The location of an error in a union also contains the names of validators.
    inner = ".".join(str(part) for part in items[0]["loc"][1:] if re.fullmatch(r"[\w.-]+", str(part)))
    said = "; or ".join(dict.fromkeys(_said(item) for item in items))
    subject = f"{name.upper()}{where}: " if name else ""
    return f"  {subject}{f'{inner}: ' if inner else ''}{said}"


_SAID = {
    "bool_parsing": "must be true or false",
    "dict_type": "must be a JSON object",
    "float_parsing": "must be a number, or a duration such as 30s",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_from_float": "must be an integer",
    "int_parsing": "must be an integer",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list, or items separated by commas",
    "literal_error": "must be {expected}",
    "missing": "is required",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must have at least {min_length} characters",
    "too_short": "must not be empty",
    "tuple_type": "must be a list, or items separated by commas",
}


def _said(item: Any) -> str:
    said = _SAID.get(item["type"])
    return str(item["msg"]).removeprefix("Value error, ") if said is None else said.format(**item.get("ctx", {}))
