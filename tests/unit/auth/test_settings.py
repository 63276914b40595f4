"""What ``datasync.yaml`` says about accounts reaches the service."""

from pathlib import Path

import pytest

from libs.process.settings import load_settings
from services.auth.config import AuthSettings


def test_the_limits_of_logins_stand_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "datasync.yaml"
    path.write_text(
        "auth:\n  signup: invite\n  sessionTtl: 12h\n"
        "  login: {freeAttempts: 5, freeAttemptsPerAddress: 20, delayFirst: 500ms, delayMax: 10m}\n"
    )
    monkeypatch.setenv("DATASYNC_CONFIG", str(path))
    settings = load_settings(AuthSettings)
    assert (settings.auth_signup, settings.session_ttl_seconds) == ("invite", 12 * 3600)
    assert (settings.login_free_attempts, settings.login_free_attempts_per_address) == (5, 20)
    assert (settings.login_delay_seconds_first, settings.login_delay_seconds_max) == (0.5, 600)
