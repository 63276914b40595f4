"""Settings: environment variables over ``datasync.yaml`` over defaults, read once when a process starts.

An environment variable has the setting's name in upper case (``KAFKA_BOOTSTRAP_SERVERS``). ``settings_file.py`` has the
paths in the file.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BeforeValidator,
    Field,
    FilePath,
    SecretStr,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from libs.contracts.services import SERVICES, Service, called
from libs.process.bad_settings import describe_bad_settings
from libs.process.kafka_security import KafkaSecurity, Mechanism, Protocol
from libs.process.live import Live, live
from libs.process.setting_types import (
    MONGODB_SCHEMES,
    Descriptor,
    FromJson,
    Host,
    HttpUrl,
    KafkaServers,
    LogLevel,
    MongodbUrl,
    Port,
    Seconds,
    ServiceUrls,
    listed,
)
from libs.process.settings_file import BadSettings, YamlFile, unused_settings
from libs.process.signing_keys import public_key_of, trusted_key

EXIT_BAD_SETTINGS = 2


class Settings(BaseSettings):
    """Frozen settings from the environment, ``datasync.yaml`` and defaults; a ``Live`` value in them may change."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        enable_decoding=False,
        env_ignore_empty=True,
        hide_input_in_errors=True,
        validate_default=False,
    )

    public: ClassVar[bool] = False
    """Whether ``server.host`` and ``server.port`` of the file are meant for this class."""

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


SettingsT = TypeVar("SettingsT", bound=Settings)


def load_settings(settings: type[SettingsT]) -> SettingsT:
    """Read a service's settings; bad ones are listed on stderr, and the process exits with code 2."""
    try:
        return settings()
    except (BadSettings, ValidationError, ValueError) as error:
        sys.stderr.write(f"datasync: bad settings\n{describe_bad_settings(error)}\n")
        raise SystemExit(EXIT_BAD_SETTINGS) from None


def with_settings(cls: type[SettingsT], added: Mapping[str, tuple[Any, Any]]) -> type[SettingsT]:
    """The same class with further settings: the type and the field of each, by its name."""
    fields: dict[str, Any] = {**added}
    return create_model(cls.__name__, __base__=cls, __module__=cls.__module__, __doc__=cls.__doc__, **fields)


def with_url_settings(services: Iterable[Service]) -> Callable[[type[SettingsT]], type[SettingsT]]:
    """Adds the URL of every service that others call: ``auth_url``, ``catalog_url`` and so on."""
    return lambda cls: with_settings(
        cls,
        {
            service.url_setting: (
                ServiceUrls,
                Field(
                    default=service.default_url,
                    description=f"where the other services call `{service.name}`: the URL of each instance, separated "
                    "by commas, or of a name with several addresses.",
                ),
            )
            for service in called(services)
        },
    )


class StoreSettings(Settings):
    """Where a service's data are, without its other secrets: what the operator's commands need.

    Args:
        mongodb_url: the MongoDB replica set that holds the services' databases.
        database_prefix: the prefix of this installation's database names.
        db_url: the same as `MONGODB_URL` if it begins with ``mongodb://``. Any other scheme names the default database
            of one-call sync tasks.
        kafka_bootstrap_servers: Kafka's bootstrap servers, as ``host:port`` separated by commas. Without Kafka, the
            services read the event log directly from each other's event stores.
        kafka_topic_prefix: the prefix of this installation's topic names, for a Kafka cluster with other users.
        kafka_security_protocol: the security protocol of the brokers' listener.
        kafka_ssl_ca_file: the certificate authorities that the brokers' certificates are verified against, in PEM. The
            system's by default.
        kafka_ssl_cert_file: the client certificate, in PEM, for brokers that require one.
        kafka_ssl_key_file: the client certificate's private key, in PEM, not encrypted.
        kafka_sasl_mechanism: the SASL mechanism.
        kafka_sasl_username: the user name. Required with a SASL protocol.
        kafka_sasl_password: the password. Required with a SASL protocol.
        database_pool_min: how many connections to MongoDB each service keeps open.
        database_pool_max: how many connections to MongoDB each service may have, besides those of its write path.
        log_level: the lowest level that is logged.
        log_format: ``auto`` is readable on a terminal and JSON elsewhere.
    """

    mongodb_url: MongodbUrl = Field(default="mongodb://localhost:27017/?replicaSet=datasync", repr=False)
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


@with_url_settings(SERVICES)
class ServiceSettings(StoreSettings):
    """What every service has. Each adds its own settings in a subclass in its ``config.py``.

    Args:
        data_dir: the data directory. The suite keeps databases, keys and logs there; each service writes there what the
            operator's commands need to find its data.
        otlp_endpoint: the OpenTelemetry collector that receives traces and metrics, such as ``http://collector:4318``.
        host: the address to listen on.
        port: the port to listen on.
        signing_key: this service's Ed25519 private key, 32 bytes in base64.
        trusted_keys: the other services' Ed25519 public keys, in base64, by service.
        shutdown_delay_seconds: how long the process keeps accepting requests after it was told to stop, while `/readyz`
            already answers 503 and each response closes its connection. For load balancers that learn of it late.
        shutdown_timeout_seconds: how long requests in progress may take to finish at shutdown.
        inherited_sockets: file descriptors of listening sockets that the process was started with. They replace `HOST`
            and `PORT`. With a socket unit of systemd: ``3``.
        instance: this process's name among the processes of its service. A process that starts under the name of one
            that died takes over its leases and ends its open transaction, so no two running processes may share a name.
    """

    data_dir: Path | None = None
    host: Host = "127.0.0.1"
    port: Port = 0
    otlp_endpoint: HttpUrl | None = None
    signing_key: SecretStr | None = None
    trusted_keys: FromJson[dict[str, str]] = Field(default_factory=dict)
    shutdown_delay_seconds: Seconds = 0.0
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

    def urls_of(self, service: str) -> str:
        """Where a service answers internal calls and forwarded requests, separated by commas if it is at several."""
        return str(getattr(self, f"{service}_url"))


def settings_without_effect(settings: StoreSettings) -> dict[str, str]:
    """The settings that are set but not used yet, by the name that they were set by, and why."""
    unused = unused_settings()
    if settings.db_url is not None:
        unused["DB_URL"] = "it names no MongoDB; one-call sync tasks, which would use it, do not exist yet"
    return unused
