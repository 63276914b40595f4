"""One run of one stream in a process of its own, as a worker's, which then tells the most memory that it ever had."""

import asyncio
import json
import sys
from pathlib import Path

from services.worker.memory import bound_memory

KIBIBYTE = 1024


def main() -> None:
    bound_memory()
    from libs.connectors import registry  # noqa: PLC0415
    from libs.connectors.postgres import source  # noqa: PLC0415
    from tests.integration.connectors.moving import Counts, context_of, plan_of  # noqa: PLC0415

    # Tables of few pages are read by several connections too.
    source.PART_PAGES_MIN = 1
    ends = json.loads(sys.argv[1])

    async def move() -> None:
        reading = registry.open_source("postgres", ends["source"])
        writing = registry.open_destination(ends["type"], ends["destination"])
        async with reading.snapshot() as snapshot, writing.open(context_of(verify=False)) as run:
            table = await snapshot.table(plan_of("t"))
            await run.prepare(table)
            await run.write(table, Counts())

    asyncio.run(move())
    # Of this program alone: what the operating system calls its resources counts the parent's before it began.
    status = Path("/proc/self/status").read_text()
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    print(int(peak) * KIBIBYTE)  # noqa: T201 - the test reads it


if __name__ == "__main__":
    main()
