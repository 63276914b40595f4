"""Who may import whom."""

from importlinter.application import use_cases
from importlinter.configuration import configure


def test_every_import_contract_holds() -> None:
    """The contracts stand in ``pyproject.toml`` under ``tool.importlinter``; ``lint-imports`` shows what breaks one."""
    configure()
    assert use_cases.lint_imports(cache_dir=None)
