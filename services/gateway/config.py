"""The settings of the gateway."""

import json
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, SecretStr
from pydantic_settings import NoDecode

from libs.runtime.settings import Seconds, ServiceSettings


def _listed(value: Any) -> Any:
    """A JSON list, or what people write: ``https://a.example, https://b.example``."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    items = json.loads(text) if text.startswith("[") else [item for item in text.split(",") if item.strip()]
    return [str(item).strip().rstrip("/") for item in items]


class GatewaySettings(ServiceSettings):
    """What an installation may choose about its public door.

    Args:
        signing_key: without it no service would believe the gateway.
        server_timeout: how long a service may take until its answer begins; tests of connections get longer.
        allowed_origins: the web pages that may call with a session cookie from elsewhere.
    """

    public: ClassVar[bool] = True

    signing_key: SecretStr
    port: int = Field(default=8080, ge=0, le=65535)
    server_timeout: Seconds = Field(default=30.0, gt=0)
    allowed_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed)] = ("http://localhost:8000",)
