"""A newcomer finds a thing by its folder and file name."""

import ast
import re
import subprocess
import tomllib
from itertools import chain

import pytest

from tests.architecture.source import ROOT, python_files, services, tree_of

NAMES_THAT_SAY_NOTHING = {"utils", "util", "helpers", "helper", "common", "manager", "base", "misc"}
READERS_OF_THE_ENVIRONMENT = {
    "libs/process/settings_file.py",
    # These pass their own environment on to the processes and services that they start.
    "libs/suite/settings.py",
    "libs/suite/supervisor.py",
    # Sets a variable that Arrow looks at while it is loaded, and reads none.
    "services/worker/memory.py",
}


@pytest.mark.parametrize("service", services())
def test_a_service_has_its_files(service: str) -> None:
    folder = ROOT / "services" / service
    for name in ("__init__.py", "__main__.py", "app.py", "config.py"):
        assert (folder / name).is_file(), f"services/{service}/{name} is missing"
    assert ast.get_docstring(tree_of(folder / "__init__.py")), f"services/{service} does not say what it is for"


def test_no_file_has_a_name_that_says_nothing() -> None:
    named = [path for path in python_files("libs", "services") if path.stem in NAMES_THAT_SAY_NOTHING]
    assert named == []


def test_only_the_settings_read_the_environment() -> None:
    readers = {
        str(path.relative_to(ROOT))
        for path in python_files("libs", "services")
        if re.search(r"\bos\.(environ|getenv)\b", path.read_text())
    }
    outside_tests = {path for path in readers if not path.startswith("libs/testing/")}
    assert outside_tests <= READERS_OF_THE_ENVIRONMENT


def test_every_path_that_is_named_exists() -> None:
    """In the pages, and in the comments and docstrings of the code."""
    pages = [
        *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
    ]
    missing = [
        (str(page.relative_to(ROOT)), named)
        for page in (*pages, *python_files("libs", "services", "deploy", "proto"))
        for named in re.findall(r"`((?:libs|services|tests|deploy|proto|docs)/[\w/.-]+)`", page.read_text())
        if not (ROOT / named).exists()
    ]
    assert missing == []


def test_every_module_of_the_product_says_what_it_is_for() -> None:
    silent = [
        str(path.relative_to(ROOT)) for path in python_files("libs", "services") if not ast.get_docstring(tree_of(path))
    ]
    assert silent == []


def test_every_library_is_named_with_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    named = (ROOT / "ARCHITECTURE.md").read_text()
    libraries = [re.split(r"[=<>\[ ]", requirement)[0] for requirement in requirements]
    assert [library for library in libraries if not re.search(rf"(?<![\w-]){library}(?![\w-])", named)] == []


def test_every_dependency_is_pinned_in_the_lock() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    locks = {name: (ROOT / "requirements" / f"{name}.txt").read_text() for name in ("runtime", "embedded", "dev")}
    wanted = {
        "runtime": project["project"]["dependencies"],
        "embedded": list(chain.from_iterable(project["project"]["optional-dependencies"].values())),
        "dev": project["dependency-groups"]["dev"],
    }
    for name, requirements in wanted.items():
        missing = [requirement for requirement in requirements if f"\n{requirement} " not in locks[name]]
        assert missing == [], f"requirements/{name}.txt is old: run make lock"


def test_cleaning_the_working_tree_leaves_the_data_directory() -> None:
    """A suite may be running on it."""
    told = subprocess.run(["make", "-n", "clean"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    assert ".datasync" not in told.stdout.split()
    assert ".venv" in told.stdout.split()
