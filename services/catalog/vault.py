"""Configurations and their secrets: masked, encrypted, decrypted."""

import asyncio
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from libs.connectors import registry
from libs.connectors.form import Path
from libs.core.errors import CallOperator, FieldError, InvalidInput, TooLarge
from libs.core.json import JsonObject, canonical_json, dump_json, parse_json
from libs.eventsourcing.batch import SideWrite
from libs.eventsourcing.documents import Documents
from libs.mongodb.encryption import Keyring, Sealed
from services.catalog.domain.connection import Definition, Role
from services.catalog.masks import Mask, is_masked, parse_mask, secrets_in, with_secrets

SECRETS = "secrets"
CONFIG_BYTES_MAX = 800 * 1024
REF_BYTES = 16


@dataclass(frozen=True, slots=True)
class Configuration:
    """A valid configuration with its secrets in plain text, which never leaves this process's memory.

    Args:
        type: the connector's canonical name.
        address: where it points; a masked secret is honoured for its own address only.
    """

    role: Role
    type: str
    clear: JsonObject
    address: str

    @property
    def secrets(self) -> dict[Path, str]:
        return secrets_in(self.clear, registry.secret_fields(self.role, self.type))

    def masked_json(self, entity_id: int, secret_ref: str) -> str:
        """The configuration as it is stored and shown.

        Raises:
            TooLarge: it would not fit an event.
        """
        masks = {path: str(Mask(self.role, entity_id, ".".join(path), secret_ref)) for path in self.secrets}
        text = dump_json(with_secrets(self.clear, masks))
        size_bytes = len(text.encode())
        if size_bytes > CONFIG_BYTES_MAX:
            message = f"is {size_bytes} bytes of compact JSON; at most {CONFIG_BYTES_MAX} are allowed"
            raise TooLarge(f"config {message}", errors=[FieldError("config", message, "too_large")])
        return text


@dataclass(frozen=True, slots=True)
class Place:
    """Where a secret belongs; an encrypted secret can't be decrypted for another place."""

    project_id: int
    role: Role
    entity_id: int
    secret_ref: str
    type: str
    address: str

    @property
    def associated(self) -> bytes:
        return canonical_json(
            [self.project_id, self.role, self.entity_id, self.secret_ref, self.type, self.address],
        )


class Vault:
    """The stored secrets of sources and destinations."""

    def __init__(self, documents: Documents, keyring: Keyring) -> None:
        self._documents = documents
        self._keyring = keyring

    async def configuration(
        self, project_id: int, role: Role, connector_type: str, config: JsonObject
    ) -> Configuration:
        """The configuration that was sent, checked, with each mask replaced by the secret that it stands for.

        Raises:
            InvalidInput: the type is unknown, fields are missing, unknown or wrong, or a mask is not to be honoured:
                it is of another project, of an earlier secret, or of a connection with another address.
        """
        kind = registry.canonical_type(role, connector_type)
        given = secrets_in(config, registry.secret_fields(role, kind))
        masked = {path: value for path, value in given.items() if is_masked(value)}
        opened = await asyncio.gather(*(self._unmask(project_id, role, kind, path, masked[path]) for path in masked))
        clear = with_secrets(config, {path: secret for path, (secret, _) in zip(masked, opened, strict=True)})
        address = registry.address_of(role, kind, clear)
        for path, (_, place) in zip(masked, opened, strict=True):
            if place.address != address:
                raise _type_it_again(path)
        return Configuration(role, kind, clear, address)

    def new_ref(self) -> str:
        """The id of a secret yet to be stored: 128 random bits."""
        return secrets.token_urlsafe(REF_BYTES)

    def seal(self, place: Place, values: Mapping[Path, str], now: datetime) -> SideWrite:
        """The write that stores these secrets."""
        plain = canonical_json({".".join(path): value for path, value in values.items()})
        document = {
            "project_id": place.project_id,
            "role": place.role,
            "entity_id": place.entity_id,
            "type": place.type,
            "address": place.address,
            "created_at": now,
            **self._keyring.encrypt(plain, place.associated).document(),
        }
        return SideWrite(SECRETS, place.secret_ref, document)

    @staticmethod
    def forget(secret_ref: str) -> SideWrite:
        """The write that deletes secrets."""
        return SideWrite(SECRETS, secret_ref, None)

    async def clear_config(self, definition: Definition) -> JsonObject:
        """A stored configuration with its secrets in plain text; raises ``CallOperator`` if they can't be decrypted."""
        config: JsonObject = parse_json(definition.config_json.encode())
        if definition.secret_ref is None:
            return config
        values, _ = await self.stored(definition.secret_ref)
        return with_secrets(config, values)

    async def stored(self, secret_ref: str) -> tuple[dict[Path, str], str]:
        """The secrets of a connection by their paths, and the address that they are for."""
        found = await self._open(secret_ref)
        if found is None:
            raise CallOperator("the secrets of a connection are not stored", code="secret_missing")
        values, place = found
        return {tuple(field.split(".")): value for field, value in values.items()}, place.address

    async def _unmask(self, project_id: int, role: Role, kind: str, path: Path, value: str) -> tuple[str, Place]:
        mask = parse_mask(value)
        if mask is None or mask.role != role:
            raise _type_it_again(path)
        found = await self._open(mask.secret_ref)
        if found is None:
            raise _type_it_again(path)
        values, place = found
        same_place = (place.project_id, place.role, place.entity_id, place.type) == (
            project_id,
            role,
            mask.entity_id,
            kind,
        )
        if not same_place or mask.field != ".".join(path) or mask.field not in values:
            raise _type_it_again(path)
        return values[mask.field], place

    async def _open(self, secret_ref: str) -> tuple[dict[str, str], Place] | None:
        document = await self._documents.document(SECRETS, secret_ref)
        if document is None:
            return None
        place = _place_of(document)
        values: dict[str, str] = parse_json(self._keyring.decrypt(Sealed.of(document), place.associated))
        return values, place


def _place_of(document: Mapping[str, Any]) -> Place:
    return Place(
        project_id=document["project_id"],
        role=document["role"],
        entity_id=document["entity_id"],
        secret_ref=document["_id"],
        type=document["type"],
        address=document["address"],
    )


def _type_it_again(path: Path) -> InvalidInput:
    """The same refusal for every reason, so that it reveals nothing about stored secrets."""
    field = ".".join(("config", *path))
    message = f"the masked value is not valid here; type the {path[-1].replace('_', ' ')} again"
    return InvalidInput(
        f"{field}: {message}", code="secret_not_honoured", errors=[FieldError(field, message, "masked")]
    )
