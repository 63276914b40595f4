"""The settings of the gateway."""

import re
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from libs.contracts.services import service_named
from libs.core.addresses import IPNetwork
from libs.process.live import Live, live
from libs.process.setting_types import Port, Seconds, is_port_in_range, listed
from libs.process.settings import ServiceSettings

_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s/?#@*]+")


def _origin(text: str) -> str:
    origin = text.rstrip("/")
    if _ORIGIN.fullmatch(origin) is None or not is_port_in_range(origin):
        raise ValueError("must be origins such as https://app.example.com, each by itself and without a path")
    return origin


Origin = Annotated[str, AfterValidator(_origin)]
Limit = Annotated[int, Field(ge=0)]


class GatewaySettings(ServiceSettings):
    """The settings of the public API.

    Args:
        signing_key: the gateway's Ed25519 private key, which the services trust.
        server_timeout: how long a service may take until its response begins. Connection tests have longer.
        allowed_origins: the origins whose web pages may call the API with a session cookie.
        trusted_proxies: the networks of the reverse proxies whose ``X-Forwarded-For`` is trusted.
        rate_limits: ``false`` disables all rate limits. A limit of 0 disables that limit.
        rate_limit_address_per_minute: requests per client address before authentication.
        rate_limit_sync_per_minute: requests per caller under ``/api/v1/sync``.
        rate_limit_project_per_minute: requests per caller to the routes of projects.
        rate_limit_v2_standard_per_hour: requests per caller under ``/api/v2``.
        rate_limit_v2_enterprise_per_hour: the same for callers of the rate class ``enterprise``.
    """

    public: ClassVar[bool] = True

    signing_key: SecretStr
    port: Port = service_named("gateway").port
    server_timeout: Seconds = Field(default=30.0, gt=0)
    allowed_origins: Live[Annotated[tuple[Origin, ...], BeforeValidator(listed)]] = live(("http://localhost:8000",))
    trusted_proxies: Annotated[tuple[IPNetwork, ...], BeforeValidator(listed)] = ()
    rate_limits: bool = True
    rate_limit_address_per_minute: Live[Limit] = live(300)
    rate_limit_sync_per_minute: Live[Limit] = live(1000)
    rate_limit_project_per_minute: Live[Limit] = live(1000)
    rate_limit_v2_standard_per_hour: Live[Limit] = live(1000)
    rate_limit_v2_enterprise_per_hour: Live[Limit] = live(10_000)
