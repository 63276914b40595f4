"""The ``datasync`` command."""

import argparse
import importlib.util
import runpy
import sys
from collections.abc import Sequence

from pydantic import ValidationError

from libs.runtime.settings import EXIT_BAD_SETTINGS, BadSettings, describe_bad_settings
from libs.runtime.suite import CannotStart, SuiteSettings
from libs.runtime.supervisor import up


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    match options.command:
        case "up":
            return _up()
        case "serve":
            return _serve(options.service)
        case unknown:
            raise AssertionError(f"no such command: {unknown}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="datasync", description="A self-hosted data synchronisation platform.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("up", help="start the whole suite on this machine and stay until Ctrl-C")
    serve = commands.add_parser("serve", help="run one service in this process")
    serve.add_argument("service", metavar="SERVICE", help="gateway, auth, catalog, job_orchestrator or worker")
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


if __name__ == "__main__":
    sys.exit(main())
