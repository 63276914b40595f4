"""The settings of a service's store, kept in the data directory for the operator's commands.

So a command acts on the running installation, and not on whatever the environment of its shell names.
"""

import json
import re
from pathlib import Path
from typing import Any, TypeVar

from libs.process.private_files import private_directory, write_private
from libs.process.settings import StoreSettings

KEPT = (
    "mongodb_url",
    "database_prefix",
    "kafka_bootstrap_servers",
    "kafka_topic_prefix",
    "kafka_security_protocol",
    "kafka_ssl_ca_file",
    "kafka_ssl_cert_file",
    "kafka_ssl_key_file",
    "kafka_sasl_mechanism",
    "kafka_sasl_username",
)

_PASSWORD = re.compile(
    r"(?<=://)[^@/]*@|(?<=[?&])(?:tlsCertificateKeyFilePassword|authMechanismProperties)=[^&]*&?", re.IGNORECASE
)

_IS_STRIPPED = "mongodb_url_is_stripped"

SettingsT = TypeVar("SettingsT", bound=StoreSettings)


class OtherInstallation(Exception):
    """The settings given to the command differ from the service's; the message names them."""


def keep_settings(service: str, settings: StoreSettings, data_dir: Path) -> None:
    """Write the settings of a service's store, without credentials."""
    kept = settings.model_dump(mode="json", include=set(KEPT))
    folder = private_directory(data_dir / "settings")
    write_private(folder / f"{service}.json", json.dumps(_without_password(kept), indent=2) + "\n")


def settings_of_installation(settings: type[SettingsT], service: str, data_dir: Path, **known: Any) -> SettingsT:
    """The settings for a command: those that the service last ran with, or else those given here.

    Args:
        known: settings that are not kept and not read from the environment.

    Raises:
        OtherInstallation: settings given here differ from the service's, or a password is missing.
    """
    given = settings(**known)
    path = data_dir / "settings" / f"{service}.json"
    try:
        kept = {name: value for name, value in json.loads(path.read_text()).items() if name in (*KEPT, _IS_STRIPPED)}
    except FileNotFoundError:
        return given
    is_stripped = kept.pop(_IS_STRIPPED, False)
    here = _without_password(given.model_dump(mode="json", include=given.model_fields_set & set(KEPT)))
    different = sorted(name.upper() for name in here.keys() & kept.keys() if here[name] != kept[name])
    if different:
        raise OtherInstallation(
            f"{', '.join(different)}: not the settings of the running service, which are kept in {path}. "
            "Unset them, or select the installation with DATA_DIR or --config",
        )
    if is_stripped and "mongodb_url" not in here:
        raise OtherInstallation(f"MONGODB_URL must be set: the service's, in {path}, has a password, which is not kept")
    return settings(**{name: value for name, value in kept.items() if name not in here}, **known)


def _without_password(values: dict[str, Any]) -> dict[str, Any]:
    url = values.get("mongodb_url")
    if url is None:
        return values
    stripped = _PASSWORD.sub("", url)
    return {**values, "mongodb_url": stripped, _IS_STRIPPED: stripped != url}
