"""Keys as files, a directory for each service: for containers that share no environment, such as those of Compose."""

import base64
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from libs.contracts.services import Service
from libs.process.private_files import private_directory, write_private
from libs.process.signing_keys import new_signing_key, public_key_of
from libs.suite.settings import kept, new_encryption_keys

SETTINGS = "settings"
MONGODB_USER = "datasync"
SERVICE_UID = 10001
MONGODB_UID = 999


def write_key_files(
    directory: Path, services: Sequence[Service], api_key: str | None, mongodb_address: str | None
) -> None:
    """Write ``<service>/settings`` for each service; keys that are there are kept.

    Args:
        api_key: the first project's API key.
        mongodb_address: ``host:port`` of a MongoDB for which a user's password and a key file are generated in
            ``mongodb/``.
    """
    signing = {
        service.name: kept(private_directory(directory / service.name) / "signing_key", lambda: new_signing_key()[0])
        for service in services
    }
    trusted = json.dumps({name: public_key_of(key) for name, key in signing.items()})
    mongodb_url = _mongodb_url(directory / "mongodb", mongodb_address) if mongodb_address else None
    for service in services:
        folder = directory / service.name
        settings = {"SIGNING_KEY": signing[service.name], "TRUSTED_KEYS": trusted}
        if "encryption_keys" in service.secrets:
            settings["ENCRYPTION_KEYS"] = kept(folder / "encryption.json", new_encryption_keys)
        if "api_key" in service.secrets and api_key:
            settings["API_KEY"] = api_key
        if mongodb_url and (service.has_store or service.is_public):
            settings["MONGODB_URL"] = mongodb_url
        write_private(folder / SETTINGS, "".join(f"{name}={value}\n" for name, value in settings.items()))
        _give_to(SERVICE_UID, folder)


def _mongodb_url(folder: Path, address: str) -> str:
    password = kept(private_directory(folder) / "password", lambda: secrets.token_urlsafe(24))
    kept(folder / "keyfile", lambda: base64.b64encode(secrets.token_bytes(512)).decode())
    _give_to(MONGODB_UID, folder)
    return f"mongodb://{MONGODB_USER}:{quote(password)}@{address}/?replicaSet=datasync&authSource=admin"


def _give_to(uid: int, folder: Path) -> None:
    if os.getuid() == 0:
        for path in (folder, *folder.iterdir()):
            os.chown(path, uid, uid)
