"""``datasync.yaml``, and what the environment says about it."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic.fields import FieldInfo
from pydantic_settings import PydanticBaseSettingsSource

CONFIG_VARIABLE = "DATASYNC_CONFIG"
CONFIG_DEFAULT = "datasync.yaml"

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
"""The setting at each path of ``datasync.yaml``. Any other path is rejected."""

WITHOUT_EFFECT: Mapping[str, str] = MappingProxyType(
    {
        "sync_interval": "how often a one-call sync task repeats. There are no such tasks yet; jobs have a `frequency`",
        "webhook_timeout": "how long a receiver may take to answer. Webhooks are not sent yet",
        "webhook_retries": "how often a failed delivery is retried. Webhooks are not sent yet",
    }
)
"""Settings that are accepted but not used yet. A warning is logged for each that is set."""

_PUBLIC_ADDRESS = frozenset({"server.host", "server.port"})
"""The file's address is the installation's, so only the gateway and the suite read it."""

_SECTIONS = frozenset(
    ".".join(path.split(".")[:depth]) for path in YAML_SETTINGS for depth in range(1, path.count(".") + 1)
)


class BadSettings(Exception):
    """The file can't be read, or has an unknown key."""


class YamlFile(PydanticBaseSettingsSource):
    """The values in ``datasync.yaml`` of one class of settings.

    Raises:
        BadSettings: the file that ``DATASYNC_CONFIG`` names does not exist, the file is not YAML, or it has unknown
            keys.
    """

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        written = dict(_leaves(_read()))
        unknown = sorted(path for path in written if path not in YAML_SETTINGS)
        if unknown:
            known = ", ".join(sorted(YAML_SETTINGS))
            raise BadSettings(f"unknown keys: {', '.join(unknown)} (known are: {known})")
        public = getattr(self.settings_cls, "public", False)
        return {
            YAML_SETTINGS[path]: value
            for path, value in written.items()
            if YAML_SETTINGS[path] in self.settings_cls.model_fields and (public or path not in _PUBLIC_ADDRESS)
        }


def use_config(path: str) -> None:
    """Read this file in place of ``datasync.yaml``, here and in the processes that this one starts."""
    os.environ[CONFIG_VARIABLE] = path


def config_path() -> str:
    """The file that is read."""
    return os.environ.get(CONFIG_VARIABLE) or CONFIG_DEFAULT


def unused_settings() -> dict[str, str]:
    """The settings that are set but not used yet, by the name that they were set by, and what they are for."""
    written = {YAML_SETTINGS[path]: path for path, _ in _leaves(_read()) if path in YAML_SETTINGS}
    in_file = {written[name]: why for name, why in WITHOUT_EFFECT.items() if name in written}
    return in_file | {name.upper(): why for name, why in WITHOUT_EFFECT.items() if os.environ.get(name.upper())}


def _read() -> Any:
    path = Path(config_path())
    if not os.environ.get(CONFIG_VARIABLE) and not path.is_file():
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
    """Every value by its dotted path. Empty sections and empty values are skipped, unless their key is unknown."""
    if isinstance(value, dict) and path not in YAML_SETTINGS:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif path == "":
        raise BadSettings("the file must be a mapping of sections such as server: and database:")
    elif value is not None or not (path in _SECTIONS or path in YAML_SETTINGS):
        yield path, value
