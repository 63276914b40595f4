"""An owner of things in a process of its own, which writes and relays until SIGTERM, for tests that suspend it.

``python -m libs.testing.owner_process MONGODB_URL DATABASE_PREFIX BOOTSTRAP_SERVERS LEASE_SECONDS``. The first line
it prints is its name as a holder of leases; the last, after SIGTERM, is the number of acknowledged commands.
"""

import asyncio
import signal
import sys

from libs.core.ids import uuid7
from libs.eventsourcing.relay import Relay
from libs.mongodb.leases import Leases
from libs.testing.followers import installation

WRITERS = 4
PAUSE_SECONDS = 0.005


async def main(mongodb_url: str, database_prefix: str, bootstrap_servers: str, lease_seconds: str) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with (
        installation(mongodb_url, database_prefix, bootstrap_servers) as place,
        place.owner(relays=0) as owner,
    ):
        event_log = place.open_log("things")
        leases = Leases(owner.store.database["leases"], float(lease_seconds))
        relay = Relay(owner.store, event_log, owner.commands)
        relaying = asyncio.create_task(leases.run_while_leader("relay", relay.run))
        print(leases.holder, flush=True)  # noqa: T201 - the test reads it
        made = 0

        async def write() -> None:
            nonlocal made
            while not stop.is_set():
                name = uuid7()
                await owner.make(name, name)
                made += 1
                await asyncio.sleep(PAUSE_SECONDS)

        async with asyncio.TaskGroup() as writers:
            for _ in range(WRITERS):
                writers.create_task(write())
        relaying.cancel()
        await asyncio.wait({relaying})
        await event_log.close()
        print(made, flush=True)  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
