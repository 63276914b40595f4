"""The gateway's desynchronisation fuzzer at length: ``python -m tests.benchmarks.desynchronisation 1000000``."""

import asyncio
import random
import sys
import time

import uvloop

from tests.integration.gateway.desynchronisation import fuzz


async def main(requests: int, seed: int) -> int:
    """Send so many requests; 1 when one of them was answered with what was another's."""
    started_at = time.perf_counter()
    report = await fuzz(requests, seed)
    took_seconds = time.perf_counter() - started_at
    print(f"seed {seed}: {requests:,} requests in {took_seconds:.0f} s, {requests / took_seconds:.0f}/s")
    print(", ".join(f"{count:,} {outcome}" for outcome, count in report.outcomes.most_common()))
    print(*(report.wrong or ["nothing foreign, nothing unasked for"]), sep="\n")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    sys.exit(asyncio.run(main(count, int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32))))
