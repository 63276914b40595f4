"""A run of a stream in its own process, which is killed at the step that a test chooses."""

import asyncio
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import asyncpg

KILLED = 77
# What a destination does to its database or its directory.
_STATEMENTS = ("execute", "fetch", "fetchrow", "fetchval", "copy_to_table")
_CHANGES = {"os.rename", "os.link", "os.symlink", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


class Steps:
    """Counts the steps, and ends the process at one of them."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.count = 0

    def take(self) -> None:
        self.count += 1
        if self.count == self.last:
            os._exit(KILLED)

    def at_statements(self, database: str) -> None:
        """Every statement of a connection to this database is a step, before it is sent and after it was answered."""
        for name in _STATEMENTS:
            setattr(asyncpg.Connection, name, self._counted(getattr(asyncpg.Connection, name), database))

    def _counted(self, method: Callable[..., Any], database: str) -> Callable[..., Any]:
        async def counted(connection: Any, *arguments: Any, **options: Any) -> Any:
            here = connection._params.database == database
            if here:
                self.take()
            result = await method(connection, *arguments, **options)
            if here:
                self.take()
            return result

        return counted

    def at_changes(self) -> None:
        """Every change of a directory is a step."""

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_CREAT | os.O_DIRECTORY)
            if event in _CHANGES or opened:
                self.take()

        sys.addaudithook(count)


def main() -> None:
    given = json.loads(sys.argv[1])
    from tests.integration.connectors.moving import (  # noqa: PLC0415
        Lake,
        Server,
        context_of,
        move_changes,
        plan_from,
    )

    steps = Steps(given["step"])

    async def move() -> None:
        async with Server.connected(given["source"]) as source:
            if given["kind"] == "postgres":
                async with Server.connected(given["destination"]) as server:
                    await _move(source, server)
            else:
                from pathlib import Path  # noqa: PLC0415

                await _move(source, Lake(Path(given["destination"])))

    async def _move(source: Server, to: Any) -> None:
        if given["kind"] == "postgres":
            steps.at_statements(to.config["database"])
        else:
            steps.at_changes()
        context = context_of(given["run_id"], given["epoch"], verify=False)
        await move_changes(source, to, plan_from(given["plan"]), context, deletes=given["deletes"])

    asyncio.run(move())


if __name__ == "__main__":
    main()
