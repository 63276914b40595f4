"""The settings of the auth service."""

from typing import Literal

from pydantic import Field, SecretStr

from libs.contracts.services import service_named
from libs.process.settings import Port, Seconds, ServiceSettings

DAY_SECONDS = 24 * 60 * 60


class AuthSettings(ServiceSettings):
    """What an installation may choose about accounts and credentials.

    Args:
        auth_signup: ``open`` lets anybody make an account; ``invite`` leaves it to the owners of projects.
        api_key: one read-write key for the first project, known from the start; at least 8 characters.
        session_ttl_seconds: a session that nobody used for this long has ended.
        session_cookie_secure: send the cookie over TLS only.
        rate_limits: False turns the throttling of logins off, as it does the gateway's limits.
        login_free_attempts: failures of one account in a row before logins have to wait; of an OAuth client likewise.
        login_free_attempts_per_address: the same for one client address, whatever the accounts.
        login_delay_seconds_first: the first wait; every further failure doubles it.
        login_delay_seconds_max: where the doubling ends.
    """

    port: Port = service_named("auth").port
    auth_signup: Literal["open", "invite"] = "open"
    api_key: SecretStr | None = Field(default=None, min_length=8, max_length=512)
    session_ttl_seconds: Seconds = Field(default=7.0 * DAY_SECONDS, ge=60)
    session_cookie_secure: bool = False
    rate_limits: bool = True
    login_free_attempts: int = Field(default=10, ge=1)
    login_free_attempts_per_address: int = Field(default=50, ge=1)
    login_delay_seconds_first: Seconds = Field(default=1.0, gt=0)
    login_delay_seconds_max: Seconds = Field(default=300.0, gt=0)
