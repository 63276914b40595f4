"""The pages about settings say what the code does."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from libs.contracts.services import SERVICES
from libs.process.settings import load_settings
from libs.process.settings_file import WITHOUT_EFFECT, YAML_SETTINGS
from libs.process.settings_reference import settings_of
from libs.process.signing_keys import new_signing_key
from libs.suite.settings import SuiteSettings, new_encryption_keys

DOCS = Path(__file__).parents[3] / "docs"
READERS = {
    service.name: importlib.import_module(f"services.{service.name}.app").SERVICE.settings for service in SERVICES
}


def printed(*arguments: str) -> str:
    command = [sys.executable, "-m", "libs.suite.cli", "settings", *arguments]
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


def test_the_whole_sample_with_its_signs_taken_off_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "datasync.yaml"
    monkeypatch.setenv("DATASYNC_CONFIG", str(file))
    monkeypatch.setenv("SIGNING_KEY", new_signing_key()[0])
    monkeypatch.setenv("ENCRYPTION_KEYS", new_encryption_keys())
    file.write_text("")
    defaults = {name: load_settings(settings) for name, settings in READERS.items()}
    suite_defaults = SuiteSettings()
    _, *sample = (DOCS / "datasync.yaml").read_text().splitlines()
    file.write_text("\n".join(line.removeprefix("#") for line in sample))
    assert {name: load_settings(settings) for name, settings in READERS.items()} == defaults
    assert SuiteSettings() == suite_defaults
