"""Runs one stream in its own process, with a worker's memory settings, and prints its peak memory in bytes."""

import asyncio
import json
import sys
from pathlib import Path

from services.worker.memory import bound_memory

KIBIBYTE = 1024


def main() -> None:
    bound_memory()
    from libs.connectors import registry  # noqa: PLC0415
    from libs.connectors.postgres import table as postgres_table  # noqa: PLC0415
    from tests.integration.connectors.moving import Counts, context_of, plan_of  # noqa: PLC0415

    # So that tables of few pages are read by several connections, too.
    postgres_table.PART_PAGES_MIN = 1
    ends = json.loads(sys.argv[1])

    async def move() -> None:
        reading = registry.open_source("postgres", ends["source"])
        writing = registry.open_destination(ends["type"], ends["destination"])
        async with reading.snapshot() as snapshot, writing.open(context_of(verify=False)) as run:
            table = await snapshot.table(plan_of("t"))
            await run.prepare(table)
            await run.write(table, Counts())

    asyncio.run(move())
    # Not getrusage, whose maximum includes the parent process before exec.
    status = Path("/proc/self/status").read_text()
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    print(int(peak) * KIBIBYTE)  # noqa: T201 - the test reads it


if __name__ == "__main__":
    main()
