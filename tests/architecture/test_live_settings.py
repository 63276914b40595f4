"""A setting that may change while a service runs is read when it is needed, not copied when the service starts."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_origin

from libs.contracts.services import SERVICES
from libs.process.live import Live
from tests.architecture.source import ROOT, python_files, tree_of
from tests.architecture.test_services import definition_of

LIVE = {
    name
    for service in SERVICES
    for name, field in definition_of(service).settings.model_fields.items()
    if get_origin(field.annotation) is Live
}
CONSTRUCTORS = {"__init__", "__post_init__"}


def copies_in(path: Path) -> Iterator[int]:
    """The lines that take a live setting's value in a constructor, in a composition root or while importing."""
    tree = tree_of(path)
    later = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        and function.name not in CONSTRUCTORS
        and path.name != "app.py"
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr="value", value=ast.Attribute(attr=name)) if name in LIVE and id(node) not in later:
                yield node.lineno


def test_there_are_live_settings() -> None:
    assert {"log_level", "allowed_origins", "worker_poll_seconds"} <= LIVE


def test_no_module_copies_the_value_of_a_live_setting_when_it_starts() -> None:
    copies = [
        f"{path.relative_to(ROOT)}:{line}" for path in python_files("libs", "services") for line in copies_in(path)
    ]
    assert copies == []


def test_a_copy_is_found(tmp_path: Path) -> None:
    copying = tmp_path / "poller.py"
    copying.write_text(
        "class Poller:\n"
        "    def __init__(self, settings):\n"
        "        self.seconds = settings.worker_poll_seconds.value\n"
        "    def run(self):\n"
        "        return self.settings.worker_poll_seconds.value\n"
    )
    assert list(copies_in(copying)) == [3]
