"""The suite on one machine: its settings, its data directory and the keys in it, and each service's environment."""

import base64
import fcntl
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from libs.contracts.services import GATEWAY, SERVICES, Secret, Service, called, service_named
from libs.core.ids import checksum_base62, random_base62
from libs.process.private_files import private_directory, write_private
from libs.process.setting_types import MONGODB_SCHEMES, Host
from libs.process.settings import EXIT_BAD_SETTINGS, Settings, with_settings
from libs.process.signing_keys import new_signing_key, public_key_of

Port = Annotated[int, Field(ge=1, le=65535)]


SuiteT = TypeVar("SuiteT", bound="SuiteSettings")


class CannotStart(Exception):
    """The suite can't start; the message says what to do about it."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def with_port_settings(services: Sequence[Service]) -> Callable[[type[SuiteT]], type[SuiteT]]:
    """Makes a class the settings of a suite of these services, with the port of each: ``auth_port`` and so on."""

    def add(cls: type[SuiteT]) -> type[SuiteT]:
        suite = with_settings(
            cls,
            {
                service.port_setting: (
                    Port,
                    Field(default=service.port, description=f"where `{service.name}` listens in the suite."),
                )
                for service in services
                if service.port_setting not in cls.model_fields
            },
        )
        suite.services = tuple(services)
        return suite

    return add


@with_port_settings(SERVICES)
class SuiteSettings(Settings):
    """The settings of an installation on one machine.

    Args:
        data_dir: the data directory: databases, keys and logs of this installation.
        host: the address that the gateway listens on. Everything else listens on 127.0.0.1.
        port: the gateway's port.
        mongodb_port: the port of the mongod that the suite starts.
        mongodb_url: an existing MongoDB replica set. Without one, the suite starts a mongod on `MONGODB_PORT`.
        db_url: the same as `MONGODB_URL` if it begins with ``mongodb://``. Other schemes concern the services.
        api_key: the first project's API key. Without one, the suite generates a key and keeps it in the data directory.
    """

    model_config = SettingsConfigDict(extra="ignore")

    public: ClassVar[bool] = True
    services: ClassVar[tuple[Service, ...]] = ()

    data_dir: Path = Path(".datasync")
    host: Host = "127.0.0.1"
    port: Port = service_named(GATEWAY).port
    mongodb_port: Port = 27117
    mongodb_url: str | None = None
    db_url: SecretStr | None = None
    api_key: SecretStr | None = Field(default=None, min_length=8)
    log_format: Literal["auto", "json", "console"] = "auto"

    @property
    def external_mongodb_url(self) -> str | None:
        """The existing MongoDB, or None if the suite starts its own."""
        db_url = self.db_url.get_secret_value() if self.db_url else ""
        return self.mongodb_url or (db_url if db_url.startswith(MONGODB_SCHEMES) else None)

    def port_of(self, service: Service) -> int:
        port: int = getattr(self, service.port_setting)
        return port

    def host_of(self, service: Service) -> str:
        """The address that a service listens on; only public services can be reached from other machines."""
        return self.host if service.is_public else "127.0.0.1"

    def url_of(self, service: Service) -> str:
        return f"http://127.0.0.1:{self.port_of(service)}"


@dataclass(frozen=True)
class Keys:
    """The secrets of one installation.

    Args:
        signing_keys: Ed25519 private keys by service, base64 of the raw 32 bytes.
        trusted_keys: the public keys, likewise.
        encryption_keys: the keys that wrap the data keys of secrets, base64 of 32 bytes by key id; the first encrypts.
    """

    signing_keys: Mapping[str, str]
    trusted_keys: Mapping[str, str]
    encryption_keys: Mapping[str, str]
    api_key: str


@contextmanager
def locked_data_dir(settings: SuiteSettings) -> Iterator[Path]:
    """Lock the data directory, so that no two suites use it.

    Raises:
        CannotStart: another process has locked it, or it can't be used.
    """
    try:
        directory = private_directory(settings.data_dir)
    except OSError as error:
        raise CannotStart(f"DATA_DIR: {settings.data_dir} can't be used: {error.strerror}", EXIT_BAD_SETTINGS) from None
    with (directory / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise CannotStart(
                f"DataSync is already running on {directory.resolve()} ({lock.read().strip()}). "
                "Stop it first, or set DATA_DIR to another directory."
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()}, gateway on port {settings.port}\n")
        lock.flush()
        yield directory
        lock.truncate(0)


def load_keys(directory: Path, settings: SuiteSettings) -> Keys:
    """The keys in the data directory; missing ones are generated."""
    folder = private_directory(directory / "keys")
    signing = {
        service.name: kept(folder / f"{service.name}.ed25519", lambda: new_signing_key()[0])
        for service in settings.services
    }
    encryption = kept(folder / "encryption.json", new_encryption_keys)
    api_key = settings.api_key.get_secret_value() if settings.api_key else kept(directory / "api_key", _new_api_key)
    trusted = {name: public_key_of(key) for name, key in signing.items()}
    return Keys(signing, trusted, json.loads(encryption), api_key)


def service_environment(service: Service, settings: SuiteSettings, keys: Keys, mongodb_url: str) -> dict[str, str]:
    """The environment of a service's process: our own, and the settings that connect the services of this suite.

    Only the services that need a secret are given it.
    """
    secrets: dict[Secret, str] = {
        "api_key": keys.api_key,
        "encryption_keys": json.dumps(dict(keys.encryption_keys)),
    }
    environment = {name: value for name, value in os.environ.items() if name.lower() not in secrets}
    environment |= {
        "HOST": settings.host_of(service),
        "PORT": str(settings.port_of(service)),
        "MONGODB_URL": mongodb_url,
        "SIGNING_KEY": keys.signing_keys[service.name],
        "TRUSTED_KEYS": json.dumps(dict(keys.trusted_keys)),
    }
    environment |= {other.url_setting.upper(): settings.url_of(other) for other in called(settings.services)}
    return environment | {name.upper(): secrets[name] for name in service.secrets}


def kept(path: Path, make: Callable[[], str]) -> str:
    """The text of a private file, which is written first if it does not exist."""
    if not path.exists():
        write_private(path, make())
    return path.read_text().strip()


def new_encryption_keys() -> str:
    """A value for ``ENCRYPTION_KEYS`` with one new key."""
    return json.dumps({f"k{secrets.token_hex(4)}": base64.b64encode(secrets.token_bytes(32)).decode()})


def _new_api_key() -> str:
    text = f"ds_live_{random_base62(32)}"
    return text + checksum_base62(text)
