"""The baseline of ``postgres_to_parquet``: dlt reads a table with connectorx and writes Parquet files.

Run by the Python of an environment of its own: ``python dlt_baseline.py DSN TABLE DIRECTORY``. Prints the seconds that
the pipeline took and the most memory that it had resident, in bytes, as JSON.
"""

import json
import os
import resource
import sys
import time


def main(dsn: str, table: str, directory: str) -> None:
    """Run the pipeline in ``directory``; the imports are not counted."""
    os.environ |= {
        "RUNTIME__DLTHUB_TELEMETRY": "false",
        "RUNTIME__LOG_LEVEL": "ERROR",
        "DATA_WRITER__COMPRESSION": "zstd",
        "DATA_WRITER__PARQUET_COMPRESSION": "zstd",
    }
    import dlt  # noqa: PLC0415 - it reads the environment when it is imported
    from dlt.sources.sql_database import sql_table  # noqa: PLC0415

    pipeline = dlt.pipeline(
        pipeline_name="baseline",
        pipelines_dir=os.path.join(directory, "pipelines"),
        destination=dlt.destinations.filesystem(bucket_url=f"file://{directory}/lake"),
        dataset_name="lake",
    )
    started = time.monotonic()
    source = sql_table(credentials=dsn, table=table, backend="connectorx", reflection_level="full")
    pipeline.run(source, loader_file_format="parquet", write_disposition="replace")
    seconds = time.monotonic() - started
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
