"""The only reader of the environment: environment variables over ``datasync.yaml`` over defaults, read once, frozen.

The environment names a setting in upper case (``KAFKA_BOOTSTRAP_SERVERS``); the file has the nested shape of
``YAML_SETTINGS``, which every service reads alike and takes its own settings from.
"""

import ipaddress
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    FilePath,
    SecretStr,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, ForceDecode, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError
from pymongo.errors import PyMongoError
from pymongo.uri_parser import parse_uri

from libs.contracts.services import PLANNED, SERVICES, Service, called
from libs.process.kafka_security import KafkaSecurity, Mechanism, Protocol
from libs.process.live import Live, live
from libs.process.signing_keys import public_key_of, trusted_key

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
        "kafka.securityProtocol": "kafka_security_protocol",
        "kafka.ssl.caFile": "kafka_ssl_ca_file",
        "kafka.ssl.certFile": "kafka_ssl_cert_file",
        "kafka.ssl.keyFile": "kafka_ssl_key_file",
        "kafka.sasl.mechanism": "kafka_sasl_mechanism",
        "kafka.sasl.username": "kafka_sasl_username",
        "kafka.sasl.password": "kafka_sasl_password",
        "sync.interval": "sync_interval",
        "sync.maxRetries": "max_retries",
        "sync.backoff": "sync_backoff",
        "sync.runRetention": "run_retention_seconds",
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

WITHOUT_EFFECT: Mapping[str, str] = MappingProxyType(
    {
        "sync_interval": "how often a one-call sync task repeats; there are none yet, jobs have their `frequency`",
        "webhook_timeout": "how long a receiver may take to answer; webhooks are not sent yet",
        "webhook_retries": "how often a failed delivery is tried again; webhooks are not sent yet",
    }
)
"""What the documented ``datasync.yaml`` may say and nothing heeds yet: told in a warning, never in silence."""

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


def _with_a_port(url: str) -> str:
    if not is_port_in_range(url):
        raise ValueError("the port must be a number from 1 to 65535")
    return url


def is_port_in_range(url: str) -> bool:
    """Whether a URL names no port, or one that can be."""
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


T = TypeVar("T")
FromJson = Annotated[T, ForceDecode]
"""A value that the environment writes as JSON."""

HttpUrl = Annotated[str, Field(pattern=r"^https?://[^\s/?#]+(/[^\s?#]*)?$"), AfterValidator(_with_a_port)]


def _listening_host(host: str) -> str:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if _HOST_NAME.fullmatch(host) is None or host.rpartition(".")[2].isdecimal():
            raise ValueError("must be an address such as 0.0.0.0, or a name, without a scheme and a port") from None
    return host


_HOST_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?(?:\.[A-Za-z0-9_-]+)*")

Host = Annotated[str, AfterValidator(_listening_host)]
"""Where to listen."""


def _kafka_servers(servers: str) -> str:
    for server in servers.split(","):
        _with_a_port(f"kafka://{server.strip()}")
    return servers


KafkaServers = Annotated[str, Field(pattern=r"^[^\s,]+:\d+(\s*,\s*[^\s,]+:\d+)*$"), AfterValidator(_kafka_servers)]


def _log_level(value: Any) -> str:
    name = str(value).upper()
    return "WARN" if name == "WARNING" else name


LogLevel = Annotated[Literal["DEBUG", "INFO", "WARN", "ERROR"], BeforeValidator(_log_level)]

Port = Annotated[int, Field(ge=0, le=65535)]
"""A port to listen on; 0 takes a free one."""

Descriptor = Annotated[int, Field(ge=3)]


def listed(value: Any) -> Any:
    """A JSON list, or what people write: items with commas between them."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return json.loads(value)
    return [item.strip() for item in value.split(",") if item.strip()]


class BadSettings(Exception):
    """The file can't be read, or says something that no setting has a place for."""


class StoreSettings(BaseSettings):
    """The settings of a service's store, with no other secrets: all that the operator's commands need.

    Args:
        mongodb_url: the state store.
        database_prefix: what the names of this installation's databases begin with.
        db_url: ``mongodb://…`` is the state store; another scheme names the database that tasks use by default.
        kafka_bootstrap_servers: where Kafka is, ``host:port`` with commas between several; without it the event log is
            embedded in the services' own stores.
        kafka_topic_prefix: what the names of this installation's topics begin with, on a shared cluster.
        kafka_security_protocol: of the brokers' listener: ``PLAINTEXT``, ``SSL``, ``SASL_PLAINTEXT`` or ``SASL_SSL``.
        kafka_ssl_ca_file: authorities that the brokers' certificates may come from, in PEM; the system's by default.
        kafka_ssl_cert_file: the certificate that is shown to brokers that ask for one, in PEM.
        kafka_ssl_key_file: the key of that certificate, in PEM, not encrypted.
        kafka_sasl_mechanism: ``PLAIN``, ``SCRAM-SHA-256`` or ``SCRAM-SHA-512``.
        kafka_sasl_username: the user, where the protocol is one with SASL.
        kafka_sasl_password: the user's password.
        database_pool_min: how many connections to MongoDB each service keeps open.
        database_pool_max: how many it may have at a time, beside those of its write path.
        log_level: ``DEBUG``, ``INFO``, ``WARN`` or ``ERROR``.
        log_format: ``auto`` is readable on a terminal and JSON elsewhere.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        enable_decoding=False,
        env_ignore_empty=True,
        hide_input_in_errors=True,
        validate_default=False,
    )

    public: ClassVar[bool] = False

    mongodb_url: str = Field(default="mongodb://localhost:27017/?replicaSet=datasync", repr=False)
    database_prefix: str = Field(default="datasync_", pattern=r"^[A-Za-z0-9_-]{0,32}$")
    db_url: SecretStr | None = None
    kafka_bootstrap_servers: KafkaServers | None = None
    kafka_topic_prefix: str = Field(default="", pattern=r"^[A-Za-z0-9._-]{0,64}$")
    kafka_security_protocol: Protocol = "PLAINTEXT"
    kafka_ssl_ca_file: FilePath | None = None
    kafka_ssl_cert_file: FilePath | None = None
    kafka_ssl_key_file: FilePath | None = None
    kafka_sasl_mechanism: Mechanism = "SCRAM-SHA-512"
    kafka_sasl_username: str | None = None
    kafka_sasl_password: SecretStr | None = None
    database_pool_min: int = Field(default=0, ge=0, le=1000)
    database_pool_max: int = Field(default=50, ge=5, le=1000)
    log_level: Live[LogLevel] = live("INFO")
    log_format: Literal["auto", "json", "console"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _state_store_of_db_url(cls, values: dict[str, Any]) -> dict[str, Any]:
        db_url = values.get("db_url")
        if isinstance(db_url, str) and db_url.startswith(MONGODB_SCHEMES):
            return {**values, "db_url": None, "mongodb_url": values.get("mongodb_url") or db_url}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.database_pool_min > self.database_pool_max:
            raise ValueError("DATABASE_POOL_MIN is over DATABASE_POOL_MAX")
        has_sasl = self.kafka_security_protocol.startswith("SASL_")
        if has_sasl and not (self.kafka_sasl_username and self.kafka_sasl_password):
            protocol = self.kafka_security_protocol
            raise ValueError(f"KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD: required with {protocol}")
        if not has_sasl and (self.kafka_sasl_username or self.kafka_sasl_password):
            names = "KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD"
            raise ValueError(f"KAFKA_SECURITY_PROTOCOL: must be SASL_SSL or SASL_PLAINTEXT for {names} to be used")
        has_tls = self.kafka_security_protocol.endswith("SSL")
        if not has_tls and (self.kafka_ssl_ca_file or self.kafka_ssl_cert_file):
            raise ValueError("KAFKA_SECURITY_PROTOCOL: must be SSL or SASL_SSL for certificates to be used")
        if (self.kafka_ssl_cert_file is None) != (self.kafka_ssl_key_file is None):
            raise ValueError("KAFKA_SSL_CERT_FILE and KAFKA_SSL_KEY_FILE: one needs the other")
        return self

    @property
    def kafka_security(self) -> KafkaSecurity:
        return KafkaSecurity(
            self.kafka_security_protocol,
            self.kafka_ssl_ca_file,
            self.kafka_ssl_cert_file,
            self.kafka_ssl_key_file,
            self.kafka_sasl_mechanism,
            self.kafka_sasl_username,
            self.kafka_sasl_password,
        )

    @field_validator("mongodb_url")
    @classmethod
    def _mongodb_url(cls, value: str) -> str:
        if not value.startswith(MONGODB_SCHEMES):
            raise ValueError("must begin with mongodb:// or mongodb+srv://")
        # SRV records are resolved when the store is first used.
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


AnySettingsT = TypeVar("AnySettingsT", bound=BaseSettings)
SettingsT = TypeVar("SettingsT", bound="StoreSettings")


def with_settings(cls: type[AnySettingsT], added: Mapping[str, tuple[Any, Any]]) -> type[AnySettingsT]:
    """The same class with further settings: the type and the field of each, by its name."""
    fields: dict[str, Any] = {**added}
    return create_model(cls.__name__, __base__=cls, __module__=cls.__module__, __doc__=cls.__doc__, **fields)


def with_url_settings(services: Iterable[Service]) -> Callable[[type[SettingsT]], type[SettingsT]]:
    """Adds where each service is called that the others call: ``auth_url``, ``catalog_url`` and so on."""
    return lambda cls: with_settings(
        cls,
        {
            service.url_setting: (
                HttpUrl,
                Field(default=service.default_url, description=f"where the other services call `{service.name}`."),
            )
            for service in called(services)
        },
    )


@with_url_settings((*SERVICES, *PLANNED))
class ServiceSettings(StoreSettings):
    """What every service has; each adds its own in a subclass in its ``config.py``.

    Args:
        data_dir: where the suite keeps its databases, keys and logs, and each service what the operator's commands
            need to find its data.
        otlp_endpoint: where traces and metrics are pushed to, such as ``http://collector:4318``.
        host: the address to listen at.
        port: the port to listen at.
        signing_key: this service's Ed25519 private key, 32 bytes in base64.
        trusted_keys: Ed25519 public keys in base64, by the service that signs with them.
        shutdown_timeout_seconds: how long requests in flight may take to finish at shutdown.
        inherited_sockets: file descriptors of listening sockets that the process was started with; it listens there
            and neither at ``host`` nor ``port``. With a socket unit of systemd: ``3``.
        instance: this process's name among those of its service. A process that takes the name of one that has died
            has its leases at once, and ends the transaction that it left open; two at a time would disturb each other.
    """

    data_dir: Path | None = None
    host: Host = "127.0.0.1"
    port: Port = 0
    otlp_endpoint: HttpUrl | None = None
    signing_key: SecretStr | None = None
    trusted_keys: FromJson[dict[str, str]] = Field(default_factory=dict)
    shutdown_timeout_seconds: Seconds = 20.0
    inherited_sockets: Annotated[tuple[Descriptor, ...], BeforeValidator(listed)] = ()
    instance: str = Field(default="", max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")

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
        raise BadSettings(f"can't be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise BadSettings(f"is not valid YAML{line}") from None


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value by its dotted path; an empty section or value says nothing, an unknown one is told of."""
    if isinstance(value, dict) and path not in YAML_SETTINGS:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif path == "":
        raise BadSettings("the file must be a mapping of sections such as server: and database:")
    elif value is not None or not (path in _SECTIONS or path in YAML_SETTINGS):
        yield path, value


_SECTIONS = frozenset(
    ".".join(path.split(".")[:depth]) for path in YAML_SETTINGS for depth in range(1, path.count(".") + 1)
)


def settings_without_effect(settings: "StoreSettings") -> dict[str, str]:
    """The settings that are set but have no effect, by the name that was used, and why."""
    written = {YAML_SETTINGS[path]: path for path, _ in _leaves(_read_yaml()) if path in YAML_SETTINGS}
    found = {written[name]: why for name, why in WITHOUT_EFFECT.items() if name in written}
    found |= {name.upper(): why for name, why in WITHOUT_EFFECT.items() if os.environ.get(name.upper())}
    if settings.db_url is not None:
        found["DB_URL"] = "it names no MongoDB, so it would be the database of one-call sync tasks; there are none yet"
    return found


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
    # For a union, the path also contains the validators of its alternatives.
    inner = ".".join(str(part) for part in items[0]["loc"][1:] if re.fullmatch(r"[\w.-]+", str(part)))
    said = "; or ".join(dict.fromkeys(_said(item) for item in items))
    subject = f"{name.upper()}{where}: " if name else ""
    return f"  {subject}{f'{inner}: ' if inner else ''}{said}"


def _said(item: Any) -> str:
    if item["type"] in ("tuple_type", "list_type"):
        return "must be a list, or items with commas between them"
    return str(item["msg"]).removeprefix("Value error, ")
