"""``datasync rebuild``, ``datasync parked`` and ``datasync repair``: the operator's commands on one service."""

import argparse
import asyncio
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from libs.core.errors import DataSyncError
from libs.runtime.mongo import PyMongoError
from libs.runtime.rebuild import RebuildFailed, RebuildReport
from libs.runtime.repair import Operations, operations
from libs.runtime.settings import load_settings

RETRY_SECONDS_MAX = 30.0
RETRY_POLL_SECONDS = 0.2


def add_operator_commands(commands: Any) -> None:
    """Add the commands to the parser's."""
    rebuild = commands.add_parser("rebuild", help="build a service's documents anew from events, compare and swap")
    rebuild.add_argument("service", metavar="SERVICE")
    rebuild.add_argument("--compare", action="store_true", help="only compare; exits 1 when something differs")
    parked = commands.add_parser("parked", help="messages that could not be handled")
    actions = parked.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (("list", "show them"), ("retry", "try them again, in order")):
        action = actions.add_parser(name, help=text)
        action.add_argument("service", metavar="SERVICE")
        if name == "retry":
            action.add_argument("--topic", help="only those of this topic")
            action.add_argument("--stream", help="only those of this stream")
    repair = commands.add_parser("repair", help="set a topic going again that stopped with an alarm")
    repair.add_argument("service", metavar="SERVICE")
    repair.add_argument("topic", metavar="TOPIC")


def operate(options: argparse.Namespace, definition_of: Callable[[str], Any]) -> int:
    """Run one of the commands; returns the exit code."""
    name = options.service.replace("-", "_")
    if not name.isidentifier() or importlib.util.find_spec(f"services.{name}") is None:
        print(f"datasync: there is no service {options.service!r}", file=sys.stderr)
        return 2
    definition = definition_of(name)
    if not definition.uses_store:
        print(f"datasync: {name} keeps no events", file=sys.stderr)
        return 2
    try:
        return asyncio.run(_operate(options, definition))
    except (DataSyncError, PyMongoError, OSError, RebuildFailed) as error:
        print(f"datasync: {error}", file=sys.stderr)
        return 1


async def _operate(options: argparse.Namespace, definition: Any) -> int:
    async with operations(definition, load_settings(definition.settings)) as service:
        match options.command, getattr(options, "action", None):
            case "rebuild", _:
                report = await service.rebuild(swap=not options.compare)
                _print_rebuild(report)
                return 0 if report.is_equal or report.swapped else 1
            case "parked", "list":
                return await _list_parked(service)
            case "parked", _:
                return await _retry_parked(service, options)
            case _:
                repaired = await service.repair(options.topic)
                print(repaired.action)
                if repaired.rebuild is not None:
                    _print_rebuild(repaired.rebuild)
                return 0


def _print_rebuild(report: RebuildReport) -> None:
    for item in report.collections:
        verdict = "equal" if item.live_hash == item.rebuilt_hash else f"{item.different_count} different"
        print(f"{item.name}: {item.live_count} live, {item.rebuilt_count} rebuilt, {verdict}")
        if item.different:
            print(
                f"  {', '.join(map(str, item.different))}{' …' if item.different_count > len(item.different) else ''}"
            )
    done = "the rebuilt documents are live" if report.swapped else "nothing was changed"
    print(f"compared at position {report.position} in {report.seconds:.1f} s; {done}")


async def _list_parked(service: Operations) -> int:
    for message in await service.parked():
        print(f"{message.topic} {message.stream} position {message.position} {message.event_type}")
        print(f"  {message.parked_at.isoformat()}, tried {message.attempts} times: {message.reason}")
    return 0


async def _retry_parked(service: Operations, options: argparse.Namespace) -> int:
    count = await service.retry_parked(options.topic, options.stream)
    print(f"{count} messages are to be tried again")
    waited_seconds = 0.0
    while any(message.retry_requested for message in await service.parked()):
        if waited_seconds > RETRY_SECONDS_MAX:
            print("the service has not done it yet; it will when it runs")
            return 1
        await asyncio.sleep(RETRY_POLL_SECONDS)
        waited_seconds += RETRY_POLL_SECONDS
    left = len(await service.parked())
    print(f"{left} messages are still parked")
    return 1 if left else 0
