"""The rolling upgrade makes its newer version by replacing texts of this tree; whoever changes one sees it here."""

import compileall
from pathlib import Path

from tests.e2e.test_rolling_upgrade import newer_tree


def test_the_newer_version_can_be_made(tmp_path: Path) -> None:
    assert compileall.compile_dir(newer_tree(tmp_path), quiet=2)
