"""The settings of the auth service."""

from typing import Literal

from pydantic import Field, SecretStr

from libs.contracts.services import service_named
from libs.process.setting_types import Port, Seconds
from libs.process.settings import ServiceSettings

DAY_SECONDS = 24 * 60 * 60


class AuthSettings(ServiceSettings):
    """The settings of accounts and credentials.

    Args:
        auth_signup: ``open`` lets anybody sign up. With ``invite``, owners of projects add accounts.
        api_key: a read-write API key of the first project, for installations that need to know it in advance. At least
            8 characters.
        session_ttl_seconds: how long a session lasts after its last use.
        session_cookie_secure: whether the session cookie is sent over TLS only.
        rate_limits: ``false`` disables the gateway's rate limits and the throttling of logins.
        login_free_attempts: how many failed logins in a row an account, or an OAuth client, has before it must wait.
        login_free_attempts_per_address: how many failed logins in a row a client address has before it must wait.
        login_delay_seconds_first: the first wait. Each further failure doubles it.
        login_delay_seconds_max: the longest wait.
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
