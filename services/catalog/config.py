"""The settings of the catalog service."""

from typing import Annotated

from pydantic import Field, SecretStr, field_validator

from libs.contracts.services import service_named
from libs.mongodb.encryption import Keyring
from libs.process.live import Live, live
from libs.process.setting_types import FromJson, Port
from libs.process.settings import ServiceSettings


class CatalogSettings(ServiceSettings):
    """The settings of sources and destinations.

    Args:
        encryption_keys: the keys that encrypt the data keys of secrets: 32 bytes in base64, by key id. The first one
            encrypts; all of them decrypt.
        reservation_seconds: how long a source and a destination stay reserved for a job that does not exist yet.
        reservation_sweep_seconds: how often expired reservations are released.
    """

    port: Port = service_named("catalog").port
    encryption_keys: FromJson[dict[str, SecretStr]] = Field(min_length=1)
    reservation_seconds: float = Field(default=30.0, ge=1)
    reservation_sweep_seconds: Live[Annotated[float, Field(gt=0)]] = live(10.0)

    @field_validator("encryption_keys")
    @classmethod
    def _usable_keys(cls, keys: dict[str, SecretStr]) -> dict[str, SecretStr]:
        Keyring(keys)
        return keys
