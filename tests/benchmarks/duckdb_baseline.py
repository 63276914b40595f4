"""The second baseline of ``postgres_to_parquet``: DuckDB copies a table out of PostgreSQL into a Parquet file.

Run by the Python of an environment of its own: ``python duckdb_baseline.py DSN TABLE DIRECTORY``. Prints the seconds
that the copy took and the most memory that it had resident, in bytes, as JSON.
"""

import json
import resource
import sys
import time
from importlib.util import find_spec
from pathlib import Path


def main(dsn: str, table: str, directory: str) -> None:
    """Copy the table into ``directory``; the extension is loaded from its package, nothing is fetched."""
    import duckdb  # noqa: PLC0415 - of the environment that runs this

    package = find_spec("duckdb_extension_postgres_scanner")
    assert package is not None
    assert package.origin is not None
    (extension,) = Path(package.origin).parent.rglob("postgres_scanner.duckdb_extension")
    with duckdb.connect() as connection:
        connection.execute(f"LOAD '{extension}'")
        connection.execute("SET threads = 2")
        connection.execute(f"ATTACH '{dsn}' AS source (TYPE postgres, READ_ONLY)")
        started = time.monotonic()
        connection.execute(f"COPY source.{table} TO '{directory}/{table}.parquet' (FORMAT parquet, COMPRESSION zstd)")
        seconds = time.monotonic() - started
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
