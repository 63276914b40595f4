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

from libs.core.errors import DataSyncError
from libs.runtime.encryption import Keyring, rewrap_secrets
from libs.runtime.mongo import PyMongoError, connect
from libs.runtime.mongod import mongod_url
from libs.runtime.operator_cli import add_operator_commands, operate
from libs.runtime.settings import EXIT_BAD_SETTINGS, BadSettings, describe_bad_settings, load_settings
from libs.runtime.suite import SERVICES, CannotStart, SuiteSettings, load_keys, service_environment
from libs.runtime.supervisor import up


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    match options.command:
        case "up":
            return _up()
        case "serve":
            return _serve(options.service)
        case "keys":
            return _rewrap()
        case "rebuild" | "parked" | "repair":
            return operate(options, _service_definition)
        case unknown:
            raise AssertionError(f"no such command: {unknown}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="datasync", description="A self-hosted data synchronisation platform.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("up", help="start the whole suite on this machine and stay until Ctrl-C")
    serve = commands.add_parser("serve", help="run one service in this process")
    serve.add_argument("service", metavar="SERVICE", help="gateway, auth, catalog, job_orchestrator or worker")
    keys = commands.add_parser("keys", help="the keys that encrypt connectors' secrets")
    actions = keys.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("rewrap", help="wrap every stored secret by the first of ENCRYPTION_KEYS; safe while running")
    add_operator_commands(commands)
    return parser


def _up() -> int:
    try:
        settings = SuiteSettings()
    except (BadSettings, ValidationError) as error:
        print(f"datasync: bad settings\n{describe_bad_settings(error)}", file=sys.stderr)
        return EXIT_BAD_SETTINGS
    try:
        return up(settings)
    except CannotStart as error:
        print(f"datasync: {error}", file=sys.stderr)
        return 1


def _serve(name: str) -> int:
    service = name.replace("-", "_")
    if not service.isidentifier() or importlib.util.find_spec(f"services.{service}") is None:
        print(f"datasync: there is no service {name!r}", file=sys.stderr)
        return 2
    # So that argparse of whatever runs next sees the service's own name, as with `python -m services.<name>`.
    sys.argv = [f"datasync serve {name}"]
    runpy.run_module(f"services.{service}", run_name="__main__", alter_sys=True)
    return 0


def _rewrap() -> int:
    definition = _service_definition("catalog")
    settings = load_settings(definition.settings)
    try:
        count = asyncio.run(_rewrap_secrets(settings))
    except (DataSyncError, PyMongoError, ValueError) as error:
        print(f"datasync: {error}", file=sys.stderr)
        return 1
    print(f"{count} secrets were wrapped anew")
    return 0


async def _rewrap_secrets(settings: Any) -> int:
    client = connect(settings.mongodb_url, "datasync keys")
    try:
        secrets = client[f"{settings.database_prefix}catalog"]["secrets"]
        return await rewrap_secrets(secrets, Keyring(settings.encryption_keys))
    finally:
        client.close()


def _service_definition(name: str) -> Any:
    """A service's definition, with the settings of the suite on this machine where there is one.

    Services are found by name at run time, as the runtime stands below them.
    """
    suite = SuiteSettings()
    service = next((service for service in SERVICES if service.name == name), None)
    if service is not None and suite.external_mongodb_url is None and (suite.data_dir / "keys").is_dir():
        keys = load_keys(suite.data_dir, suite)
        os.environ.update(service_environment(service, suite, keys, mongod_url(suite.mongodb_port)))
    return importlib.import_module(f"services.{name}.app").SERVICE


if __name__ == "__main__":
    sys.exit(main())
