"""The whole suite as an operator starts it: ``datasync up`` in a process of its own, on free ports."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from libs.contracts.services import SERVICES, service_named
from libs.suite.child_process import die_with_parent, free_port
from libs.suite.supervisor import answers_200

START_TIMEOUT_SECONDS = 100.0
STOP_TIMEOUT_SECONDS = 90.0
COMMAND_TIMEOUT_SECONDS = 60.0

# Tests, benchmarks and the demo share one key and one address, and ask more in a minute than a person does.
GENEROUS_LIMITS = {
    "RATE_LIMIT_ADDRESS_PER_MINUTE": "1000000",
    "RATE_LIMIT_SYNC_PER_MINUTE": "10000000",
    "RATE_LIMIT_PROJECT_PER_MINUTE": "10000000",
    "RATE_LIMIT_V2_STANDARD_PER_HOUR": "100000000",
    "RATE_LIMIT_V2_ENTERPRISE_PER_HOUR": "100000000",
}


class SuiteFailed(Exception):
    """The suite ended or did not get ready; the message ends with its last lines."""


class Suite:
    """A running suite. As a context manager it starts, and in the end is stopped and leaves nothing.

    Args:
        environment: settings over the free ports and the generous rate limits that are chosen.
        directory: its data directory; a temporary one, removed at the end, when None.
        log_path: where its output goes; a file in the data directory when None.
    """

    def __init__(
        self,
        environment: Mapping[str, str] | None = None,
        *,
        directory: Path | None = None,
        log_path: Path | None = None,
    ) -> None:
        self._temporary = directory is None
        self.directory = directory or Path(tempfile.mkdtemp(prefix="datasync-suite-"))
        self.log_path = log_path or self.directory / "suite.log"
        ports = {service.port_setting.upper(): str(free_port()) for service in SERVICES}
        chosen = {"MONGODB_PORT": str(free_port()), "LOG_FORMAT": "json", **GENEROUS_LIMITS, **ports}
        self._environment = {**chosen, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def settings(self) -> dict[str, str]:
        """The settings that it is started with, by their names in lower case."""
        return {name.lower(): value for name, value in self._environment.items()}

    @property
    def port(self) -> int:
        return int(self._environment["PORT"])

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url_of(self, service: str) -> str:
        """Where one service listens."""
        return f"http://127.0.0.1:{self._environment[service_named(service).port_setting.upper()]}"

    @property
    def mongodb_url(self) -> str:
        return f"mongodb://127.0.0.1:{self._environment['MONGODB_PORT']}/?replicaSet=datasync"

    @property
    def api_key(self) -> str:
        return (self.directory / "api_key").read_text().strip()

    @property
    def pid(self) -> int:
        assert self._process is not None, "the suite is not running"
        return self._process.pid

    def start(self) -> None:
        """Start, on the data that is there, and return when ``GET /readyz`` of the gateway is 200."""
        assert self._process is None, "the suite is already running"
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*_DATASYNC, "up"],
                env=self._full_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self.await_ready()

    def await_ready(self) -> None:
        """Return when the gateway is ready; raise ``SuiteFailed`` when the suite ended or the time is up."""
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while not answers_200(f"{self.base_url}/readyz"):
            if self._process is None or self._process.poll() is not None:
                raise SuiteFailed(f"the suite ended while it was starting\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise SuiteFailed(f"the suite was not ready in {START_TIMEOUT_SECONDS:g} seconds\n{self.log_tail()}")
            time.sleep(0.05)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to end, wait, and return its exit code; kill it when it does not."""
        assert self._process is not None, "the suite is not running"
        process, self._process = self._process, None
        process.send_signal(number)
        try:
            return process.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise SuiteFailed(
                f"the suite did not stop in {STOP_TIMEOUT_SECONDS:g} seconds\n{self.log_tail()}"
            ) from None

    def kill(self) -> None:
        """``kill -9`` of the supervisor, with whom everything dies."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def remove(self) -> None:
        """Stop it in good order and delete its data, if that was made for it."""
        try:
            if self._process is not None:
                self.stop()
        finally:
            if self._temporary:
                shutil.rmtree(self.directory, ignore_errors=True)

    def command(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run ``datasync`` with these arguments, as the operator of this suite, with other settings where given."""
        return subprocess.run(
            [*_DATASYNC, *arguments],
            env={**self._full_environment(), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_SECONDS,
            check=False,
            cwd=self.directory,
        )

    def processes(self) -> dict[str, int]:
        """The process ids of the supervisor's children by name: the services' and ``mongod``."""
        listed = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        found = {}
        for pid in map(int, listed):
            with suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if name := re.search(r"services\.(\w+)", command):
                    found[name.group(1)] = pid
                elif "mongod" in command:
                    found["mongod"] = pid
        return found

    def log_lines(self) -> list[dict[str, Any]]:
        """What the suite wrote, as parsed JSON lines."""
        return [json.loads(line) for line in self.log_path.read_text(errors="replace").splitlines() if line[:1] == "{"]

    def log_tail(self, lines: int = 30) -> str:
        """The last lines that the suite wrote."""
        with suppress(FileNotFoundError):
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])
        return ""

    def _full_environment(self) -> dict[str, str]:
        # What the caller's shell has set for a suite of its own must not reach this one.
        inherited = {name: value for name, value in os.environ.items() if name in _INHERITED}
        return {**inherited, **self._environment, "DATA_DIR": str(self.directory)}


_DATASYNC = (sys.executable, "-P", "-m", "libs.suite.cli")
_INHERITED = {"PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH"}
