"""The ``datasync`` command."""

import argparse
import asyncio
import importlib
import importlib.util
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsError

from libs.contracts.services import SERVICES
from libs.core.clock import isoformat_z
from libs.core.errors import DataSyncError
from libs.eventsourcing.rebuild import RebuildFailed, RebuildReport
from libs.mongodb.client import PyMongoError
from libs.process.bad_settings import describe_bad_settings
from libs.process.kept_settings import OtherInstallation, settings_of_installation
from libs.process.live import Live
from libs.process.logs import configure_logs
from libs.process.settings import EXIT_BAD_SETTINGS, ServiceSettings, StoreSettings
from libs.process.settings_file import BadSettings, use_config
from libs.process.settings_reference import markdown, sample, settings_of
from libs.process.signing_keys import new_signing_key
from libs.process.version import installed_version
from libs.service import operations
from libs.service.operations import RewrapSettings, StoreUnreachable
from libs.suite.key_files import SETTINGS, write_key_files
from libs.suite.mongod import mongod_url
from libs.suite.settings import CannotStart, SuiteSettings, new_encryption_keys
from libs.suite.supervisor import up

StoreSettingsT = TypeVar("StoreSettingsT", bound=StoreSettings)

EXIT_DIFFERENT = 3
EXPECTED_FAILURES = (DataSyncError, OSError, PyMongoError, RebuildFailed)


class Refused(Exception):
    """The command can't be run; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.config:
        use_config(options.config)
    try:
        return int(options.run(options))
    except (BadSettings, SettingsError, ValidationError) as error:
        print(f"datasync: bad settings\n{describe_bad_settings(error)}", file=sys.stderr)
        return EXIT_BAD_SETTINGS
    except OtherInstallation as error:
        print(f"datasync: {error}", file=sys.stderr)
        return EXIT_BAD_SETTINGS
    except CannotStart as error:
        print(f"datasync: {error}", file=sys.stderr)
        return error.exit_code
    except StoreUnreachable as error:
        print(f"datasync: {_explained(error, options)}", file=sys.stderr)
        return 1
    except (Refused, *EXPECTED_FAILURES) as error:
        print(f"datasync: {str(error) or type(error).__name__}", file=sys.stderr)
        return 1


def _explained(error: StoreUnreachable, options: argparse.Namespace) -> str:
    data_dir = _data_dir(options)
    if data_dir is None:
        return f"{error}, with the settings of {options.config}"
    if (data_dir / "settings").is_dir():
        return f"{error}, where the installation in {data_dir.resolve()} keeps its data: start it first"
    return f"no installation in {data_dir.resolve()}, and {error}: set DATA_DIR, or MONGODB_URL"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="datasync", description="A self-hosted data synchronisation platform.")
    parser.add_argument("--version", action="version", version=f"datasync {installed_version()}")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="read this file instead of datasync.yaml and instead of the settings kept in DATA_DIR",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("up", help="run the whole suite on this machine until Ctrl-C")
    command.set_defaults(run=_up)

    command = commands.add_parser("serve", help="run one service in this process")
    command.add_argument("service", metavar="SERVICE", help=", ".join(service.name for service in SERVICES))
    command.set_defaults(run=_serve)

    command = commands.add_parser("topics", help="create the topics in Kafka that are missing, and check the others")
    command.set_defaults(run=_topics)

    command = commands.add_parser("rebuild", help="rebuild a service's documents from its events, while it runs")
    command.add_argument("service", metavar="SERVICE")
    command.add_argument(
        "--compare", action="store_true", help=f"only compare; exit code {EXIT_DIFFERENT} if they differ"
    )
    command.set_defaults(run=_rebuild)

    command = commands.add_parser("repair", help="accept a topic's current content after its log or store was replaced")
    command.add_argument("service", metavar="SERVICE", help="the service that follows the topic")
    command.add_argument("topic", metavar="TOPIC")
    command.set_defaults(run=_repair)

    command = commands.add_parser("restored", help="declare that a service's database was restored from a backup")
    command.add_argument("service", metavar="SERVICE")
    command.set_defaults(run=_restored)

    command = commands.add_parser("parked", help="list the messages that a service failed to handle")
    command.add_argument("service", metavar="SERVICE")
    command.add_argument("--retry", action="store_true", help="have the running service retry them, in order")
    command.add_argument("--topic", help="only messages of this topic")
    command.add_argument("--stream", help="only messages of this stream, such as source-42")
    command.set_defaults(run=_parked)

    command = commands.add_parser("settings", help="print the reference of all settings")
    command.add_argument("--sample", action="store_true", help="print a commented datasync.yaml instead")
    command.set_defaults(run=_settings)

    actions = commands.add_parser("keys", help="signing keys and encryption keys").add_subparsers(
        required=True, metavar="ACTION"
    )
    command = actions.add_parser("new", help="print a new signing key, its public key, and a new encryption key")
    command.set_defaults(run=_new_keys)
    command = actions.add_parser(
        "files", help="write DIR/<service>/settings with the keys of each service; keys that are there are kept"
    )
    command.add_argument("directory", metavar="DIR", type=Path)
    command.add_argument("--mongodb", metavar="HOST:PORT", help="also a password and a key file for this MongoDB")
    command.set_defaults(run=_key_files)
    command = actions.add_parser(
        "rewrap", help="re-encrypt the data key of every secret with the first of ENCRYPTION_KEYS, while catalog runs"
    )
    command.set_defaults(run=_rewrap)
    return parser


def _up(_: argparse.Namespace) -> int:
    settings = SuiteSettings()
    _require_good_settings(settings)
    return up(settings)


def _require_good_settings(suite: SuiteSettings) -> None:
    """Validate every service's settings before the first service starts.

    Raises:
        CannotStart: names every bad setting once.
    """
    given_by_suite = {
        "signing_key": new_signing_key()[0],
        "trusted_keys": {},
        "encryption_keys": json.loads(new_encryption_keys()),
        "mongodb_url": suite.external_mongodb_url or mongod_url(suite.mongodb_port),
        "inherited_sockets": (),
        "instance": "",
        "data_dir": suite.data_dir,
        "log_format": suite.log_format,
    }
    refused: list[str] = []
    for service in suite.services:
        settings = _config_of(service.name)
        try:
            settings(**{name: value for name, value in given_by_suite.items() if name in settings.model_fields})
        except (BadSettings, SettingsError, ValidationError) as error:
            refused += describe_bad_settings(error).splitlines()
    if refused:
        raise CannotStart("\n".join(["bad settings", *dict.fromkeys(refused)]), EXIT_BAD_SETTINGS)


def _config_of(service: str) -> type[ServiceSettings]:
    """A service's settings class, without importing its app."""
    module = importlib.import_module(f"services.{service}.config")
    [found] = [
        item
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, ServiceSettings) and item.__module__ == module.__name__
    ]
    return found


def _serve(options: argparse.Namespace) -> int:
    name = _known_service(options.service)
    # The service must not see this command's arguments.
    sys.argv = [f"datasync serve {name}"]
    runpy.run_module(f"services.{name}", run_name="__main__", alter_sys=True)
    return 0


def _topics(_: argparse.Namespace) -> int:
    print(*asyncio.run(operations.topics(StoreSettings())), sep="\n")
    return 0


def _rebuild(options: argparse.Namespace) -> int:
    definition, settings = _service(options)
    report = asyncio.run(operations.rebuild(definition, settings, swap=not options.compare))
    _print_report(report)
    return EXIT_DIFFERENT if options.compare and not report.is_equal else 0


def _repair(options: argparse.Namespace) -> int:
    definition, settings = _service(options)
    if options.topic not in definition.topics:
        raise Refused(
            f"{definition.name} does not follow {options.topic!r} (it follows {', '.join(definition.topics)})"
        )
    repaired = asyncio.run(operations.repair(definition, settings, options.topic))
    print(repaired.action)
    if repaired.rebuild is not None:
        _print_report(repaired.rebuild)
    return 0


def _restored(options: argparse.Namespace) -> int:
    definition, settings = _service(options)
    asyncio.run(operations.restored(definition, settings))
    print(
        f"the events of {definition.name} are published again. The services that follow it stop now: "
        "run `datasync repair` for each"
    )
    return 0


def _parked(options: argparse.Namespace) -> int:
    definition, settings = _service(options)
    if options.retry:
        count = asyncio.run(operations.retry_parked(definition, settings, options.topic, options.stream))
        print(f"{count} messages will be retried")
        return 0
    for message in asyncio.run(operations.parked_messages(definition, settings)):
        if options.topic in (None, message.topic) and options.stream in (None, message.stream):
            parked_at = isoformat_z(message.parked_at)
            print(f"{parked_at}  {message.stream}  {message.event_type}  {message.id}: {message.reason}")
    return 0


def _rewrap(options: argparse.Namespace) -> int:
    definition, data_dir = _definition("catalog"), _data_dir(options)
    known = _kept_encryption_keys(data_dir)
    settings = _prepared(
        RewrapSettings(**known)
        if data_dir is None
        else settings_of_installation(RewrapSettings, definition.name, data_dir, **known)
    )
    print(f"{asyncio.run(operations.rewrap(definition, settings))} secrets were re-encrypted")
    return 0


def _kept_encryption_keys(data_dir: Path | None) -> dict[str, Any]:
    """The keys that ``datasync up`` generated; elsewhere they are in ``ENCRYPTION_KEYS``."""
    path = None if data_dir is None else data_dir / "keys" / "encryption.json"
    return {} if path is None or not path.is_file() else {"encryption_keys": json.loads(path.read_text())}


def _settings(options: argparse.Namespace) -> int:
    readers = {service.name: _settings_class(service.name) for service in SERVICES}
    settings = settings_of({**readers, "suite": SuiteSettings})
    print(sample(settings) if options.sample else markdown(settings), end="")
    return 0


def _settings_class(service: str) -> type[BaseSettings]:
    found: type[BaseSettings] = importlib.import_module(f"services.{service}.app").SERVICE.settings
    return found


def _new_keys(_: argparse.Namespace) -> int:
    private, public = new_signing_key()
    print("# the signing key of one service; no other service may have it")
    print(f"SIGNING_KEY={private}")
    print('# its public key, for all services, by service: TRUSTED_KEYS=\'{"gateway": "…", …}\'')
    print(f"TRUSTED_KEY={public}")
    print("# the key that encrypts stored secrets, for catalog only. Without it they can't be decrypted, so back it up")
    print(f"ENCRYPTION_KEYS='{new_encryption_keys()}'")
    return 0


def _key_files(options: argparse.Namespace) -> int:
    settings = SuiteSettings()
    api_key = settings.api_key.get_secret_value() if settings.api_key else None
    write_key_files(options.directory, settings.services, api_key, options.mongodb)
    print(f"the settings with the keys are in {options.directory}/<service>/{SETTINGS}")
    return 0


def _print_report(report: RebuildReport) -> None:
    for item in report.collections:
        verdict = "equal" if item.live_hash == item.rebuilt_hash else f"{item.different_count} different"
        print(f"{item.name}: {item.live_count} documents, {item.rebuilt_count} rebuilt, {verdict}")
        for identifier in item.different:
            print(f"  different: {identifier}")
    done = "swapped" if report.swapped else "compared"
    print(f"{done} at position {report.position} in {report.seconds:.1f} s")


def _known_service(name: str) -> str:
    service = name.replace("-", "_")
    if not service.isidentifier() or importlib.util.find_spec(f"services.{service}") is None:
        raise Refused(f"unknown service: {name}")
    return service


def _service(options: argparse.Namespace) -> tuple[Any, StoreSettings]:
    """A service's definition, and the settings of its store: those that it last ran with, if they are kept."""
    definition, data_dir = _definition(options.service), _data_dir(options)
    return definition, _prepared(
        StoreSettings() if data_dir is None else settings_of_installation(StoreSettings, definition.name, data_dir)
    )


def _definition(name: str) -> Any:
    """A service with a store; imported by name, since commands must not load the other services."""
    service = _known_service(name)
    definition = importlib.import_module(f"services.{service}.app").SERVICE
    if not definition.uses_store:
        raise Refused(f"{service} has no store")
    return definition


def _data_dir(options: argparse.Namespace) -> Path | None:
    """Where the installation keeps its settings; None if ``--config`` names a file instead."""
    return None if options.config else SuiteSettings().data_dir


def _prepared(settings: StoreSettingsT) -> StoreSettingsT:
    configure_logs("datasync", settings.model_copy(update={"log_level": Live("WARN")}))
    return settings


if __name__ == "__main__":
    sys.exit(main())
