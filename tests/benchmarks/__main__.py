"""``make bench``: run the benchmarks, print their ratios, keep them in ``.bench/results.json``.

A benchmark is a module of this folder with ``async def run() -> list`` of ``{benchmark, case, value, unit, baseline,
ratio}``; the ratio is ours over the baseline's, better when higher.
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import uvloop

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parents[1] / ".bench" / "results.json"

Result = dict[str, Any]


def main(wanted: list[str]) -> int:
    """Run the benchmarks of these names, all without any; returns the exit code."""
    known = sorted(path.stem for path in FOLDER.glob("[a-z]*.py") if "async def run()" in path.read_text())
    if unknown := sorted(set(wanted) - set(known)):
        print(f"no such benchmark: {', '.join(unknown)} (there are {', '.join(known)})", file=sys.stderr)
        return 2
    for name in wanted or known:
        print(f"{name} …", flush=True)
        results = uvloop.run(import_module(f"tests.benchmarks.{name}").run())
        for result in results:
            print(_line(result), flush=True)
        _keep(name, results)
    return 0


def _line(result: Result) -> str:
    value, unit, baseline, ratio = (result[key] for key in ("value", "unit", "baseline", "ratio"))
    measured = f"{value:>14,.1f}" if isinstance(value, int | float) else f"{value:>14}"
    compared = f"{ratio:6.2f} × {baseline}" if ratio is not None else ""
    return f"  {result['case']!s:<32} {measured} {unit:<24} {compared}"


def _keep(name: str, results: list[Result]) -> None:
    """Replace this benchmark's former results."""
    RESULTS.parent.mkdir(exist_ok=True)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    others = [result for result in kept if result["benchmark"] != name]
    RESULTS.write_text(json.dumps(others + results, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
