"""A live setting is read like any other, and a change of it is seen by its readers."""

from typing import Annotated

import pytest
import structlog
from pydantic import Field, ValidationError

from libs.core.principal import Principal
from libs.process.live import Live, live
from libs.process.logs import REQUEST_LINES, configure_logs
from libs.process.settings import ServiceSettings
from libs.process.settings_reference import markdown, settings_of
from libs.process.signing_keys import new_signing_key
from services.gateway.config import GatewaySettings
from services.gateway.origins import Origins
from services.gateway.rate_limits.policies import Policies


class Settings(ServiceSettings):
    """A service's settings.

    Args:
        size: how large.
    """

    size: Live[Annotated[int, Field(ge=1)]] = live(5)


def test_subscribers_are_called_with_each_different_value() -> None:
    seen: list[int] = []
    size = Live(1)
    size.subscribe(seen.append)
    for value in (1, 2, 2, 3):
        size.set(value)
    assert (size.value, seen) == (3, [2, 3])


def test_it_is_written_and_validated_like_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIZE", "7")
    assert Settings().size.value == 7
    assert Settings().model_dump()["size"] == 7
    monkeypatch.setenv("SIZE", "0")
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Settings()


def test_defaults_are_not_shared() -> None:
    changed = Settings()
    changed.size.set(9)
    assert Settings().size.value == 5


def test_settings_stay_frozen() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.size = Live(6)  # type: ignore[misc]


def test_the_reference_says_what_may_change_and_describes_its_value() -> None:
    page = markdown(settings_of({"reports": Settings}))
    assert "| `SIZE` |  | integer ≥ 1 | `5` | all | yes | how large. |" in page
    assert "| `INSTANCE` |  | text |  | all |  |" in page


def gateway_settings() -> GatewaySettings:
    return GatewaySettings.model_validate({"signing_key": new_signing_key()[0]})


def test_a_changed_rate_limit_applies_to_later_requests() -> None:
    settings = gateway_settings()
    policies = Policies(settings)
    caller = Principal(kind="api_key", subject="k", name="key")
    for limit in (7, 0, 8):
        settings.rate_limit_project_per_minute.set(limit)
        policy = policies.of("/api/v1/project/1/jobs", caller)
        assert (policy.limit if policy else 0) == limit


def test_a_changed_list_of_origins_applies_to_later_requests() -> None:
    settings = gateway_settings()
    origins = Origins(settings.allowed_origins)
    request = {"Origin": "https://app.example"}
    assert not origins.vouches_for(request)
    settings.allowed_origins.set(("https://app.example",))
    assert origins.vouches_for(request)


def test_a_changed_log_level_applies_to_loggers_in_use(logs_put_back: None, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ServiceSettings(log_format="json")
    configure_logs("catalog", settings)
    log = structlog.get_logger()
    written = []
    for level in ("INFO", "ERROR", "DEBUG"):
        settings.log_level.set(level)
        log.debug("details")
        log.info("something")
        log.error("trouble")
        written.append([line.count('"event"') for line in capsys.readouterr().out.splitlines()])
    assert [len(lines) for lines in written] == [2, 1, 3]
    assert REQUEST_LINES.service is None
    settings.log_level.set("INFO")
    assert REQUEST_LINES.service == "catalog"
