"""A rebuild in a process of its own that stops in the middle of its swap, for a test that kills it there.

``python -m libs.testing.rebuild_process MONGODB_URL DATABASE_PREFIX`` prints a line when its swap blocks all writes.
"""

import asyncio
import sys
import threading

from libs.eventsourcing.rebuild import Rebuild
from libs.mongodb.client import ClientSession
from libs.testing.followers import installation
from libs.testing.things import THING


class Hanging(Rebuild):
    def finish(self, session: ClientSession) -> None:
        super().finish(session)
        print("holding", flush=True)  # noqa: T201 - the test reads it
        threading.Event().wait()


async def main(mongodb_url: str, database_prefix: str) -> None:
    async with installation(mongodb_url, database_prefix, None) as place, place.owner() as owner:
        await Hanging(owner.store, place.open_log("rebuild"), aggregates=[THING]).run(grace_seconds=0)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
