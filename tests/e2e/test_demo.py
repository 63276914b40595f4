"""The demonstration does what it says, and says so when it can't."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from deploy.demo.flights import fetch
from libs.suite.child_process import free_port
from libs.testing.servers import A_PROXY_THAT_IS_GONE

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 110


def demo(port: int) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "deploy.demo"],
        env={**os.environ, **A_PROXY_THAT_IS_GONE, "PORT": str(port)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


def test_the_flights_arrive_in_both_destinations_row_by_row_the_same() -> None:
    # The files are downloaded, once, before the proxy is gone.
    fetch(ROOT / ".cache")
    shown = demo(free_port())
    assert shown.returncode == 0, shown.stderr
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert {(line[0], line[1], line[2], line[-1]) for line in lines if line[1:2] == ["flights"]} == {
        ("replica", "flights", "336,776", "yes"),
        ("lake", "flights", "336,776", "yes"),
    }


def test_a_taken_port_is_said_plainly() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        shown = demo(port)
    assert shown.returncode == 1
    assert f"port {port} is in use" in shown.stderr
