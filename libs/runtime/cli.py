"""The ``datasync`` command."""

import argparse
import asyncio
import importlib
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from libs.core.clock import isoformat_z
from libs.core.errors import DataSyncError
from libs.runtime import operations
from libs.runtime.logs import configure_logs
from libs.runtime.mongo import PyMongoError
from libs.runtime.mongod import mongod_url
from libs.runtime.rebuild import RebuildFailed, RebuildReport
from libs.runtime.settings import EXIT_BAD_SETTINGS, BadSettings, describe_bad_settings, load_settings
from libs.runtime.suite import SERVICES, CannotStart, SuiteSettings, load_keys, service_environment
from libs.runtime.supervisor import up

EXIT_DIFFERENT = 3
EXPECTED_FAILURES = (CannotStart, DataSyncError, PyMongoError, RebuildFailed)


class Refused(Exception):
    """The command can't be carried out; the message tells the person who gave it why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (BadSettings, ValidationError) as error:
        print(f"datasync: bad settings\n{describe_bad_settings(error)}", file=sys.stderr)
        return EXIT_BAD_SETTINGS
    except (Refused, *EXPECTED_FAILURES) as error:
        print(f"datasync: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="datasync", description="A self-hosted data synchronisation platform.")
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

    actions = commands.add_parser("keys", help="the keys that encrypt connectors' secrets").add_subparsers(
        required=True, metavar="ACTION"
    )
    command = actions.add_parser("rewrap", help="wrap every secret by the first of ENCRYPTION_KEYS, while catalog runs")
    command.set_defaults(run=_rewrap)
    return parser


def _up(_: argparse.Namespace) -> int:
    return up(SuiteSettings())


def _serve(options: argparse.Namespace) -> int:
    name = _known_service(options.service)
    # As with `python -m services.<name>`: the service sees no arguments of ours.
    sys.argv = [f"datasync serve {name}"]
    runpy.run_module(f"services.{name}", run_name="__main__", alter_sys=True)
    return 0


def _rebuild(options: argparse.Namespace) -> int:
    definition, settings = _service(options.service)
    report = asyncio.run(operations.rebuild(definition, settings, swap=not options.compare))
    _print_report(report)
    return EXIT_DIFFERENT if options.compare and not report.is_equal else 0


def _repair(options: argparse.Namespace) -> int:
    definition, settings = _service(options.service)
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
    definition, settings = _service(options.service)
    asyncio.run(operations.restored(definition, settings))
    print(f"the events of {definition.name} are published anew; `datasync repair` its followers, which stop now")
    return 0


def _parked(options: argparse.Namespace) -> int:
    definition, settings = _service(options.service)
    if options.retry:
        count = asyncio.run(operations.retry_parked(definition, settings, options.topic, options.stream))
        print(f"{count} messages wait to be tried again")
        return 0
    for message in asyncio.run(operations.parked_messages(definition, settings)):
        if options.topic in (None, message.topic) and options.stream in (None, message.stream):
            parked_at = isoformat_z(message.parked_at)
            print(f"{parked_at}  {message.stream}  {message.event_type}  {message.id}: {message.reason}")
    return 0


def _rewrap(_: argparse.Namespace) -> int:
    definition, settings = _service("catalog")
    print(f"{asyncio.run(operations.rewrap(definition, settings))} secrets were wrapped anew")
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


def _service(name: str) -> tuple[Any, Any]:
    """A service's definition and settings: those of the suite on this machine, where there is one.

    Services are found by name at run time, as the runtime stands below them.
    """
    service_name = _known_service(name)
    suite = SuiteSettings()
    service = next((service for service in SERVICES if service.name == service_name), None)
    if service is not None and suite.external_mongodb_url is None and (suite.data_dir / "keys").is_dir():
        keys = load_keys(suite.data_dir, suite)
        os.environ.update(service_environment(service, suite, keys, mongod_url(suite.mongodb_port)))
    definition = importlib.import_module(f"services.{service_name}.app").SERVICE
    if not definition.uses_store:
        raise Refused(f"{service_name} keeps nothing")
    settings = load_settings(definition.settings)
    configure_logs("datasync", settings.model_copy(update={"log_level": "WARNING"}))
    return definition, settings


if __name__ == "__main__":
    sys.exit(main())
