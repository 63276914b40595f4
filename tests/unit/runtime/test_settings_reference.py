"""The pages about settings say what the code does."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from libs.runtime.settings import WITHOUT_EFFECT, YAML_SETTINGS, load_settings
from libs.runtime.settings_reference import settings_of
from libs.runtime.suite import SERVICES, SuiteSettings

DOCS = Path(__file__).parents[3] / "docs"
READERS = {
    service.name: importlib.import_module(f"services.{service.name}.app").SERVICE.settings for service in SERVICES
}

WITH_DEFAULTS = {name: settings for name, settings in READERS.items() if name not in ("catalog", "gateway")}
"""The others need keys."""


def printed(*arguments: str) -> str:
    command = [sys.executable, "-m", "libs.runtime.cli", "settings", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_the_pages_are_as_the_code_has_it() -> None:
    """`make docs` writes them."""
    assert (DOCS / "settings.md").read_text() == printed()
    assert (DOCS / "datasync.yaml").read_text() == printed("--sample")


def test_every_setting_is_described() -> None:
    undescribed = [item.name for item in settings_of({**READERS, "suite": SuiteSettings}) if not item.about]
    assert undescribed == []


def test_what_the_file_may_say_is_read_by_somebody_or_told_to_have_no_effect() -> None:
    read = {name for settings in (*READERS.values(), SuiteSettings) for name in settings.model_fields}
    assert set(YAML_SETTINGS.values()) - read == set(WITHOUT_EFFECT)


def test_the_sample_with_its_defaults_is_a_valid_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A person takes the signs off the lines that matter; here of all that have a value."""
    lines = [line.removeprefix("#") for line in (DOCS / "datasync.yaml").read_text().splitlines()[1:]]
    text = "\n".join(line for line in lines if not line.strip().startswith("#"))
    written = yaml.safe_load(text)
    file = tmp_path / "datasync.yaml"
    monkeypatch.setenv("DATASYNC_CONFIG", str(file))
    file.write_text("")
    defaults = {name: load_settings(settings) for name, settings in WITH_DEFAULTS.items()}
    file.write_text(yaml.safe_dump(without_empty(written)))
    assert {name: load_settings(settings) for name, settings in WITH_DEFAULTS.items()} == defaults


def without_empty(section: dict[str, object]) -> dict[str, object]:
    return {
        key: without_empty(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value not in (None, {}, "")
    }
