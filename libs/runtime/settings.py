"""The only reader of the environment: environment variables over ``datasync.yaml`` over defaults, read once, frozen.

The environment names a setting in upper case (``KAFKA_BOOTSTRAP_SERVERS``); the file has the nested shape of
``YAML_SETTINGS``, which every service reads alike and takes its own settings from.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError
from pymongo.errors import PyMongoError
from pymongo.uri_parser import parse_uri

from libs.runtime.principals import public_key_of, trusted_key

CONFIG_VARIABLE = "DATASYNC_CONFIG"
CONFIG_DEFAULT = "datasync.yaml"
MONGODB_SCHEMES = ("mongodb://", "mongodb+srv://")
EXIT_BAD_SETTINGS = 2

YAML_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "server.host": "host",
        "server.port": "port",
        "server.timeout": "server_timeout",
        "server.shutdownTimeout": "shutdown_timeout_seconds",
        "server.allowedOrigins": "allowed_origins",
        "server.trustedProxies": "trusted_proxies",
        "rateLimits.enabled": "rate_limits",
        "rateLimits.addressPerMinute": "rate_limit_address_per_minute",
        "rateLimits.syncPerMinute": "rate_limit_sync_per_minute",
        "rateLimits.projectPerMinute": "rate_limit_project_per_minute",
        "rateLimits.v2StandardPerHour": "rate_limit_v2_standard_per_hour",
        "rateLimits.v2EnterprisePerHour": "rate_limit_v2_enterprise_per_hour",
        "database.url": "db_url",
        "database.pool.min": "database_pool_min",
        "database.pool.max": "database_pool_max",
        "database.mongodbUrl": "mongodb_url",
        "database.prefix": "database_prefix",
        "kafka.bootstrapServers": "kafka_bootstrap_servers",
        "kafka.topicPrefix": "kafka_topic_prefix",
        "sync.interval": "sync_interval",
        "sync.maxRetries": "max_retries",
        "sync.backoff": "sync_backoff",
        "webhook.timeout": "webhook_timeout",
        "webhook.retries": "webhook_retries",
        "auth.signup": "auth_signup",
        "auth.apiKey": "api_key",
        "auth.sessionTtl": "session_ttl_seconds",
        "auth.sessionCookieSecure": "session_cookie_secure",
        "auth.login.freeAttempts": "login_free_attempts",
        "auth.login.freeAttemptsPerAddress": "login_free_attempts_per_address",
        "auth.login.delayFirst": "login_delay_seconds_first",
        "auth.login.delayMax": "login_delay_seconds_max",
        "parquet.roots": "parquet_roots",
        "log.level": "log_level",
        "log.format": "log_format",
        "telemetry.otlpEndpoint": "otlp_endpoint",
    }
)
"""Where a setting stands in ``datasync.yaml``; a path that no service knows is refused."""

PUBLIC_ADDRESS = frozenset({"server.host", "server.port"})
"""What the file says about the address is meant for the one service that the public talks to."""

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")
_SECONDS_PER_UNIT = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(value: Any) -> Any:
    """``30``, ``"30"``, ``"30s"``, ``"1m30s"`` in seconds; anything else is left for the field to refuse."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if re.fullmatch(rf"(?:{_DURATION.pattern}\s*)+", text):
        return sum(float(number) * _SECONDS_PER_UNIT[unit] for number, unit in _DURATION.findall(text))
    return text


Seconds = Annotated[float, BeforeValidator(seconds_of), Field(ge=0)]
"""A duration in seconds that people may also write with a unit."""


HttpUrl = Annotated[str, Field(pattern=r"^https?://[^\s/?#]+(/[^\s?#]*)?$")]

Descriptor = Annotated[int, Field(ge=3)]


def _listed(value: Any) -> Any:
    """Numbers with commas between them, as environment variables have lists."""
    return [item for item in value.split(",") if item.strip()] if isinstance(value, str) else value


class BadSettings(Exception):
    """The file can't be read, or says something that no setting has a place for."""


class StoreSettings(BaseSettings):
    """Where a service's data are, and no secret beyond: all that a command on them needs.

    Args:
        mongodb_url: the state store.
        database_prefix: what the names of this installation's databases begin with.
        db_url: ``mongodb://…`` is the state store; another scheme names the database that tasks use by default.
        kafka_bootstrap_servers: None keeps the event log embedded in the services' own stores.
        kafka_topic_prefix: what the names of this installation's topics begin with, on a shared cluster.
        log_format: ``auto`` is readable on a terminal and JSON elsewhere.
    """

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_ignore_empty=True, hide_input_in_errors=True, validate_default=False
    )

    public: ClassVar[bool] = False

    mongodb_url: str = Field(default="mongodb://localhost:27017/?replicaSet=datasync", repr=False)
    database_prefix: str = Field(default="datasync_", pattern=r"^[A-Za-z0-9_-]{0,32}$")
    db_url: SecretStr | None = None
    kafka_bootstrap_servers: str | None = Field(default=None, pattern=r"^[^\s,]+:\d+(\s*,\s*[^\s,]+:\d+)*$")
    kafka_topic_prefix: str = Field(default="", pattern=r"^[A-Za-z0-9._-]{0,64}$")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["auto", "json", "console"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _state_store_of_db_url(cls, values: dict[str, Any]) -> dict[str, Any]:
        db_url = values.get("db_url")
        if isinstance(db_url, str) and db_url.startswith(MONGODB_SCHEMES):
            return {**values, "db_url": None, "mongodb_url": values.get("mongodb_url") or db_url}
        return values

    @field_validator("log_level", mode="before")
    @classmethod
    def _log_level_as_written(cls, value: Any) -> Any:
        name = str(value).upper()
        return "WARNING" if name == "WARN" else name

    @field_validator("mongodb_url")
    @classmethod
    def _mongodb_url(cls, value: str) -> str:
        if not value.startswith(MONGODB_SCHEMES):
            raise ValueError("must begin with mongodb:// or mongodb+srv://")
        # What an SRV record says is asked of the DNS when the store is first used.
        if value.startswith("mongodb://") and not _is_mongodb_url(value):
            raise ValueError(
                "is no valid connection string (special characters in a user's name and password are percent-encoded)"
            )
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, YamlFile(settings_cls)


class ServiceSettings(StoreSettings):
    """What every service has; each adds its own in a subclass in its ``config.py``.

    Args:
        data_dir: where this service's ``StoreSettings`` are kept for the commands of whoever operates it; nowhere
            without one.
        otlp_endpoint: where traces and metrics are pushed to, such as ``http://collector:4318``.
        signing_key: this service's Ed25519 private key, 32 bytes in base64.
        trusted_keys: Ed25519 public keys in base64, by the service that signs with them.
        shutdown_timeout_seconds: how long requests in flight may take to finish at shutdown.
        inherited_sockets: file descriptors of listening sockets that the process was started with; it listens there
            and neither at ``host`` nor ``port``. With a socket unit of systemd: ``3``.
        instance: this process's name among those of its service. A process that takes the name of one that has died
            has its leases at once, and ends the transaction that it left open; two at a time would disturb each other.
    """

    data_dir: Path | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)
    otlp_endpoint: HttpUrl | None = None
    signing_key: SecretStr | None = None
    trusted_keys: dict[str, str] = Field(default_factory=dict)
    auth_url: HttpUrl = "http://127.0.0.1:8081"
    catalog_url: HttpUrl = "http://127.0.0.1:8082"
    job_orchestrator_url: HttpUrl = "http://127.0.0.1:8083"
    record_sync_url: HttpUrl = "http://127.0.0.1:8084"
    webhooks_url: HttpUrl = "http://127.0.0.1:8085"
    worker_url: HttpUrl = "http://127.0.0.1:8086"
    shutdown_timeout_seconds: Seconds = 20.0
    inherited_sockets: Annotated[tuple[Descriptor, ...], NoDecode, BeforeValidator(_listed)] = ()
    instance: str = Field(default="", max_length=256)

    @field_validator("signing_key")
    @classmethod
    def _usable_signing_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            public_key_of(value.get_secret_value())
        return value

    @field_validator("trusted_keys")
    @classmethod
    def _usable_trusted_keys(cls, value: dict[str, str]) -> dict[str, str]:
        for issuer, key in value.items():
            trusted_key(issuer, key)
        return value

    def url_of(self, service: str) -> str:
        """Where a service answers internal calls and forwarded requests, without a trailing slash."""
        return str(getattr(self, f"{service}_url")).rstrip("/")


def _is_mongodb_url(value: str) -> bool:
    try:
        parse_uri(value, warn=True)
    except (PyMongoError, ValueError):
        return False
    return True


SettingsT = TypeVar("SettingsT", bound=StoreSettings)


class YamlFile(PydanticBaseSettingsSource):
    """The settings of ``datasync.yaml`` that concern one service.

    Raises:
        BadSettings: the file named by ``DATASYNC_CONFIG`` is not there, is not YAML, or has unknown keys.
    """

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        written = dict(_leaves(_read_yaml()))
        unknown = sorted(path for path in written if path not in YAML_SETTINGS)
        if unknown:
            known = ", ".join(sorted(YAML_SETTINGS))
            raise BadSettings(f"unknown keys: {', '.join(unknown)} (known are: {known})")
        public = getattr(self.settings_cls, "public", False)
        return {
            YAML_SETTINGS[path]: value
            for path, value in written.items()
            if YAML_SETTINGS[path] in self.settings_cls.model_fields and (public or path not in PUBLIC_ADDRESS)
        }


def _read_yaml() -> Any:
    named = os.environ.get(CONFIG_VARIABLE)
    path = Path(named or CONFIG_DEFAULT)
    if not named and not path.is_file():
        return {}
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise BadSettings(f"{path} can't be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise BadSettings(f"{path} is not valid YAML{line}") from None


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value by its dotted path; an empty section says nothing."""
    if isinstance(value, dict) and path not in YAML_SETTINGS:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif path == "":
        raise BadSettings("the file must be a mapping of sections such as server: and database:")
    elif value is not None or path not in _SECTIONS:
        yield path, value


_SECTIONS = frozenset(
    ".".join(path.split(".")[:depth]) for path in YAML_SETTINGS for depth in range(1, path.count(".") + 1)
)


def load_settings(settings: type[SettingsT]) -> SettingsT:
    """Read a service's settings, or say on stderr which are bad and exit with code 2."""
    try:
        return settings()
    except (BadSettings, ValidationError, ValueError) as error:
        sys.stderr.write(f"datasync: bad settings\n{describe_bad_settings(error)}\n")
        raise SystemExit(EXIT_BAD_SETTINGS) from None


def describe_bad_settings(error: Exception) -> str:
    """One line a bad setting, with its name in the environment and without its value."""
    match error:
        case ValidationError():
            names = dict.fromkeys(_setting_of(item) for item in error.errors())
            return "\n".join(
                _describe(name, [item for item in error.errors() if _setting_of(item) == name]) for name in names
            )
        case SettingsError() if matched := re.search(r'field "(\w+)"', str(error)):
            return f"  {matched[1].upper()}: is not valid JSON"
        case BadSettings():
            return f"  {os.environ.get(CONFIG_VARIABLE) or CONFIG_DEFAULT}: {error}"
        case _:
            return f"  {error}"


def _setting_of(item: Any) -> str:
    return str(item["loc"][0]) if item["loc"] else ""


def _describe(name: str, items: Sequence[Any]) -> str:
    paths = [path for path, setting in YAML_SETTINGS.items() if setting == name]
    where = f" (in {CONFIG_DEFAULT}: {paths[0]})" if paths else ""
    # Of a union, the validators of its alternatives stand in the path beside what a person wrote.
    inner = ".".join(str(part) for part in items[0]["loc"][1:] if re.fullmatch(r"[\w.-]+", str(part)))
    said = "; or ".join(dict.fromkeys(item["msg"].removeprefix("Value error, ") for item in items))
    return f"  {name.upper()}{where}: {f'{inner}: ' if inner else ''}{said}"
