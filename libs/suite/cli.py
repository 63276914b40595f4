"""The ``datasync`` command."""

import argparse
import asyncio
import importlib
import importlib.util
import json
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsError

from libs.contracts.services import SERVICES
from libs.core.clock import isoformat_z
from libs.core.errors import DataSyncError
from libs.eventsourcing.rebuild import RebuildFailed, RebuildReport
from libs.mongodb.client import PyMongoError
from libs.process.kept_settings import OtherInstallation, settings_of_installation
from libs.process.live import Live
from libs.process.logs import configure_logs
from libs.process.settings import (
    CONFIG_VARIABLE,
    EXIT_BAD_SETTINGS,
    BadSettings,
    ServiceSettings,
    SettingsT,
    StoreSettings,
    describe_bad_settings,
)
from libs.process.settings_reference import markdown, sample, settings_of
from libs.process.signing_keys import new_signing_key
from libs.process.version import installed_version
from libs.service import operations
from libs.service.operations import RewrapSettings, StoreUnreachable
from libs.suite.mongod import mongod_url
from libs.suite.settings import CannotStart, SuiteSettings, new_encryption_keys
from libs.suite.supervisor import up

EXIT_DIFFERENT = 3
EXPECTED_FAILURES = (DataSyncError, OSError, PyMongoError, RebuildFailed)


class Refused(Exception):
    """The command can't be carried out; the message tells the person who gave it why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.config:
        os.environ[CONFIG_VARIABLE] = options.config
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
        return f"{error}, where the installation in {data_dir.resolve()} keeps its data: it must run"
    return f"no installation in {data_dir.resolve()}, and {error}: set DATA_DIR, or MONGODB_URL"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="datasync", description="A self-hosted data synchronisation platform.")
    parser.add_argument("--version", action="version", version=f"datasync {installed_version()}")
    parser.add_argument(
        "--config", metavar="FILE", help="settings in place of datasync.yaml, and of those that DATA_DIR keeps"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("up", help="start the whole suite on this machine and stay until Ctrl-C")
    command.set_defaults(run=_up)

    command = commands.add_parser("serve", help="run one service in this process")
    command.add_argument("service", metavar="SERVICE", help=", ".join(service.name for service in SERVICES))
    command.set_defaults(run=_serve)

    command = commands.add_parser("rebuild", help="make a service's documents anew from events, while it runs")
    command.add_argument("service", metavar="SERVICE")
    command.add_argument(
        "--compare", action="store_true", help=f"only compare; exit code {EXIT_DIFFERENT} if different"
    )
    command.set_defaults(run=_rebuild)

    command = commands.add_parser("repair", help="accept what a topic holds now, after its log or store was replaced")
    command.add_argument("service", metavar="SERVICE", help="the service that follows the topic")
    command.add_argument("topic", metavar="TOPIC")
    command.set_defaults(run=_repair)

    command = commands.add_parser("restored", help="say that a service's database was restored from a backup")
    command.add_argument("service", metavar="SERVICE")
    command.set_defaults(run=_restored)

    command = commands.add_parser("parked", help="list the messages that a service could not handle")
    command.add_argument("service", metavar="SERVICE")
    command.add_argument("--retry", action="store_true", help="have the running service try them again, in order")
    command.add_argument("--topic", help="only those of this topic")
    command.add_argument("--stream", help="only those of this stream, such as source-42")
    command.set_defaults(run=_parked)

    command = commands.add_parser("settings", help="print the reference of all settings")
    command.add_argument("--sample", action="store_true", help="print a commented datasync.yaml instead")
    command.set_defaults(run=_settings)

    actions = commands.add_parser("keys", help="the keys that encrypt connectors' secrets").add_subparsers(
        required=True, metavar="ACTION"
    )
    command = actions.add_parser("new", help="print a new signing key with its public half, and a new encryption key")
    command.set_defaults(run=_new_keys)
    command = actions.add_parser("rewrap", help="wrap every secret by the first of ENCRYPTION_KEYS, while catalog runs")
    command.set_defaults(run=_rewrap)
    return parser


def _up(_: argparse.Namespace) -> int:
    settings = SuiteSettings()
    _require_good_settings(settings)
    return up(settings)


def _require_good_settings(suite: SuiteSettings) -> None:
    """Raise ``CannotStart`` that names what any service would refuse, before the first of them starts."""
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
    """A service's settings without all that its app would load."""
    module = importlib.import_module(f"services.{service}.config")
    [found] = [
        item
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, ServiceSettings) and item.__module__ == module.__name__
    ]
    return found


def _serve(options: argparse.Namespace) -> int:
    name = _known_service(options.service)
    # As with `python -m services.<name>`: the service sees no arguments of ours.
    sys.argv = [f"datasync serve {name}"]
    runpy.run_module(f"services.{name}", run_name="__main__", alter_sys=True)
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
    print(f"the events of {definition.name} are published anew; `datasync repair` its followers, which stop now")
    return 0


def _parked(options: argparse.Namespace) -> int:
    definition, settings = _service(options)
    if options.retry:
        count = asyncio.run(operations.retry_parked(definition, settings, options.topic, options.stream))
        print(f"{count} messages wait to be tried again")
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
    print(f"{asyncio.run(operations.rewrap(definition, settings))} secrets were wrapped anew")
    return 0


def _kept_encryption_keys(data_dir: Path | None) -> dict[str, Any]:
    """Those that ``datasync up`` made; elsewhere they are in ``ENCRYPTION_KEYS``."""
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
    print("# one service's signing key, for that service alone")
    print(f"SIGNING_KEY={private}")
    print('# its public half, for all services, under the service\'s name: TRUSTED_KEYS=\'{"gateway": "…", …}\'')
    print(f"TRUSTED_KEY={public}")
    print("# what wraps connectors' secrets, for catalog alone; without it no stored secret can be opened: save it")
    print(f"ENCRYPTION_KEYS='{new_encryption_keys()}'")
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
        raise Refused(f"there is no service {name!r}")
    return service


def _service(options: argparse.Namespace) -> tuple[Any, StoreSettings]:
    """A service's definition and the settings of its store: those it last ran with, if they are kept."""
    definition, data_dir = _definition(options.service), _data_dir(options)
    return definition, _prepared(
        StoreSettings() if data_dir is None else settings_of_installation(StoreSettings, definition.name, data_dir)
    )


def _definition(name: str) -> Any:
    """Services are found by name at run time, as the runtime stands below them."""
    service = _known_service(name)
    definition = importlib.import_module(f"services.{service}.app").SERVICE
    if not definition.uses_store:
        raise Refused(f"{service} keeps nothing")
    return definition


def _data_dir(options: argparse.Namespace) -> Path | None:
    """Where the installation's settings are kept, None if ``--config`` names a file instead."""
    return None if options.config else SuiteSettings().data_dir


def _prepared(settings: SettingsT) -> SettingsT:
    configure_logs("datasync", settings.model_copy(update={"log_level": Live("WARN")}))
    return settings


if __name__ == "__main__":
    sys.exit(main())
