"""``datasync up``: the whole suite on one machine, a process a service, started, watched and stopped together."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from libs.core.clock import isoformat_z
from libs.runtime.child_process import die_with_parent, port_is_taken
from libs.runtime.mongod import MongodMissing, MongodNotReady, await_primary, find_mongod, mongod_command, mongod_url
from libs.runtime.suite import (
    SERVICES,
    CannotStart,
    Keys,
    Service,
    SuiteSettings,
    load_keys,
    locked_data_dir,
    service_environment,
)

READY_TIMEOUT_SECONDS = 90.0
STOP_TIMEOUT_SECONDS = 60.0
STAGE_STOP_TIMEOUT_SECONDS = 26.0
MONGOD_STOP_TIMEOUT_SECONDS = 20.0
BACKOFF_SECONDS_MIN = 0.5
BACKOFF_SECONDS_MAX = 30.0
STEADY_AFTER_SECONDS = 60.0
DEATHS_BEFORE_READY_MAX = 3
LINE_SIZE_BYTES_MAX = 1024 * 1024


class Output:
    """Everything the suite says, on one stream: readable on a terminal, JSON lines elsewhere."""

    def __init__(self, stream: TextIO, *, readable: bool) -> None:
        self.readable = readable
        self._stream = stream
        self._width = max(len(service.name) for service in SERVICES)

    def say(self, event: str, text: str, **fields: object) -> None:
        """One line of our own: ``text`` for people, ``event`` and ``fields`` for programs."""
        if self.readable:
            self._write(f"{'datasync':<{self._width}} | {text}")
            return
        time_ = isoformat_z(datetime.now(UTC))
        self._write(json.dumps({"timestamp": time_, "service": "supervisor", "event": event, "text": text, **fields}))

    def relay(self, service: str, line: str) -> None:
        """One line that a service wrote."""
        if self.readable:
            self._write(f"{service:<{self._width}} | {line}")
        elif line.startswith("{"):
            self._write(line)
        else:
            self._write(json.dumps({"service": service, "event": "output", "line": line}))

    def _write(self, line: str) -> None:
        # A closed terminal must not take the suite down with it.
        with suppress(OSError):
            print(line, file=self._stream, flush=True)


@dataclass
class Child:
    """One watched process.

    Args:
        command, environment: how it is started; ``before`` is awaited each time it was.
        log_path: where its output goes; None merges it into ours.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log_path: Path | None = None
    process: asyncio.subprocess.Process | None = field(default=None, init=False)
    deaths: int = field(default=0, init=False)
    stopping: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.returncode is None

    async def run(self, output: Output) -> None:
        """Start it, and start it again with exponential backoff when it ends, until it is told to stop."""
        backoff_seconds = BACKOFF_SECONDS_MIN
        while not self.stopping.is_set():
            started = time.monotonic()
            await self._run_once(output)
            if self.stopping.is_set():
                return
            assert self.process is not None
            if time.monotonic() - started > STEADY_AFTER_SECONDS:
                backoff_seconds = BACKOFF_SECONDS_MIN
            self.deaths += 1
            output.say(
                "process_died",
                f"{self.name} {_how_it_ended(self.process.returncode)}; starting it again in {backoff_seconds:g} s",
                process=self.name,
                exit_code=self.process.returncode,
                backoff_seconds=backoff_seconds,
            )
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), backoff_seconds)
            backoff_seconds = min(backoff_seconds * 2, BACKOFF_SECONDS_MAX)

    async def stop(self, timeout_seconds: float) -> None:
        """Ask it to end (SIGTERM), and kill it when it does not within the time."""
        self.stopping.set()
        if self.process is None or not self.is_running:
            return
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.process.wait(), timeout_seconds)
        except TimeoutError:
            self.kill()
            await self.process.wait()

    def kill(self) -> None:
        """End it and what it started, at once."""
        self.stopping.set()
        if self.process is not None and self.is_running:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def _run_once(self, output: Output) -> None:
        log = self.log_path.open("ab") if self.log_path else None
        try:
            # A session of its own: Ctrl-C on the terminal reaches us alone, and we stop things in their order.
            self.process = await asyncio.create_subprocess_exec(
                *self.command,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log or subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
                limit=LINE_SIZE_BYTES_MAX,
            )
        finally:
            if log is not None:
                log.close()
        if self.stopping.is_set():
            self._signal(signal.SIGTERM)
        if self.process.stdout is not None:
            await self._relay_lines(self.process.stdout, output)
        await self.process.wait()

    async def _relay_lines(self, stream: asyncio.StreamReader, output: Output) -> None:
        while True:
            try:
                line = await stream.readline()
            except ValueError:
                output.say("line_too_long", f"{self.name} wrote a line that is too long to show", process=self.name)
                continue
            if not line:
                return
            output.relay(self.name, line.decode(errors="replace").rstrip())


class Supervisor:
    """The running suite."""

    def __init__(self, settings: SuiteSettings, directory: Path, keys: Keys, output: Output) -> None:
        self._settings = settings
        self._directory = directory
        self._keys = keys
        self._output = output
        self._mongod: Child | None = None
        self._services: dict[str, Child] = {}
        self._stop_requested = asyncio.Event()

    async def run(self) -> int:
        """Start everything, stay until told to stop, stop everything; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_stop_signal)
        exit_code = 0
        async with asyncio.TaskGroup() as tasks:
            try:
                await self._run(tasks)
            except CannotStart as error:
                self._output.say("cannot_start", f"cannot start: {error}", reason=str(error))
                exit_code = 1
            finally:
                await self._stop_all()
        return exit_code

    async def _run(self, tasks: asyncio.TaskGroup) -> None:
        self._output.say("starting", f"starting, with the data in {self._directory.resolve()}")
        mongodb_url = self._settings.external_mongodb_url or await self._start_mongod(tasks)
        for service in SERVICES:
            self._services[service.name] = child = self._child_of(service, mongodb_url)
            tasks.create_task(child.run(self._output), name=service.name)
        if await self._become_ready():
            self._announce()
            await self._stop_requested.wait()

    async def _start_mongod(self, tasks: asyncio.TaskGroup) -> str:
        data, logs = self._directory / "mongo", self._directory / "logs"
        for folder in (data, logs):
            folder.mkdir(exist_ok=True)
        port = self._settings.mongodb_port
        log_path = logs / "mongod.log"
        log_path.unlink(missing_ok=True)
        try:
            command = mongod_command(find_mongod(), data, port)
        except MongodMissing as error:
            raise CannotStart(f"{error}; or set MONGODB_URL to a replica set of yours") from None
        self._mongod = child = Child("mongod", command, os.environ, log_path)
        tasks.create_task(child.run(self._output), name="mongod")
        try:
            await asyncio.to_thread(
                await_primary,
                port,
                timeout_seconds=60.0,
                is_alive=lambda: child.deaths == 0 and not child.stopping.is_set(),
            )
        except MongodNotReady as error:
            raise CannotStart(f"{error}; see {log_path.resolve()}") from None
        return mongod_url(port)

    def _child_of(self, service: Service, mongodb_url: str) -> Child:
        environment = service_environment(service, self._settings, self._keys, mongodb_url)
        environment |= {"PYTHONUNBUFFERED": "1", "LOG_FORMAT": "console" if self._output.readable else "json"}
        return Child(service.name, (sys.executable, "-P", "-m", f"services.{service.name}"), environment)

    async def _become_ready(self) -> bool:
        """Wait until every service is; False when we were told to stop meanwhile."""
        deadline = time.monotonic() + READY_TIMEOUT_SECONDS
        waiting = {service.name: f"{service.url(self._settings)}/readyz" for service in SERVICES}
        while waiting:
            # One at a time, the gateway last: it asks the others each time that it is asked.
            name, url = next(iter(waiting.items()))
            if await asyncio.to_thread(_answers_200, url):
                del waiting[name]
                continue
            if self._stop_requested.is_set():
                return False
            self._give_up_on_the_dying()
            if time.monotonic() > deadline:
                raise CannotStart(f"not ready after {READY_TIMEOUT_SECONDS:g} seconds: {', '.join(sorted(waiting))}")
            await asyncio.sleep(0.1)
        return True

    def _give_up_on_the_dying(self) -> None:
        for child in self._services.values():
            if child.deaths >= DEATHS_BEFORE_READY_MAX:
                raise CannotStart(f"{child.name} ended {child.deaths} times while it was starting; its reason is above")

    def _announce(self) -> None:
        url = f"http://localhost:{self._settings.port}"
        key_path = (self._directory / "api_key").resolve()
        if not self._output.readable:
            self._output.say("ready", f"ready at {url}", url=url, api_key_path=str(key_path))
            return
        key = "the one in API_KEY" if self._settings.api_key else f"{self._keys.api_key}   (kept in {key_path})"
        for line in (
            "",
            f"DataSync is ready: {url} (try its API at {url}/docs)",
            f"API key: {key}",
            "Stop with Ctrl-C.",
            "",
        ):
            self._output.say("ready", line)

    def _on_stop_signal(self) -> None:
        if not self._stop_requested.is_set():
            self._stop_requested.set()
            return
        self._output.say("killing", "told to stop twice: ending everything at once")
        for child in (*self._services.values(), *((self._mongod,) if self._mongod else ())):
            child.kill()

    async def _stop_all(self) -> None:
        self._output.say("stopping", "stopping")
        deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
        for child in self._services.values():
            # A service that dies from now on stays down.
            child.stopping.set()
        for stage in sorted({service.stop_stage for service in SERVICES}):
            names = [service.name for service in SERVICES if service.stop_stage == stage]
            children = [self._services[name] for name in names if name in self._services]
            left_seconds = max(2.0, min(STAGE_STOP_TIMEOUT_SECONDS, deadline - time.monotonic()))
            await asyncio.gather(*(child.stop(left_seconds) for child in children))
        if self._mongod is not None:
            await self._mongod.stop(MONGOD_STOP_TIMEOUT_SECONDS)
        self._output.say("stopped", "stopped")


def up(settings: SuiteSettings) -> int:
    """Run the suite until it is told to stop; returns the exit code.

    Raises:
        CannotStart: the data directory or a port is taken.
    """
    readable = sys.stdout.isatty() if settings.log_format == "auto" else settings.log_format == "console"
    output = Output(sys.stdout, readable=readable)
    with locked_data_dir(settings) as directory:
        check_ports(settings)
        return asyncio.run(Supervisor(settings, directory, load_keys(directory, settings), output).run())


def check_ports(settings: SuiteSettings) -> None:
    """Raises ``CannotStart`` naming every port that is taken and the setting that moves it."""
    wanted = {service.port_setting: service.port(settings) for service in SERVICES}
    if settings.external_mongodb_url is None:
        wanted["mongodb_port"] = settings.mongodb_port
    hosts = {"port": settings.host}
    taken = {name: port for name, port in wanted.items() if port_is_taken(hosts.get(name, "127.0.0.1"), port)}
    if taken:
        ports = "; ".join(f"port {port} is taken (set {name.upper()} to use another)" for name, port in taken.items())
        raise CannotStart(f"{ports}. Another DataSync may be running on this machine.")


def _answers_200(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - our own address
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _how_it_ended(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"
