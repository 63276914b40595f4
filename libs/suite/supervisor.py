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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from libs.contracts.services import SERVICES, Service
from libs.core.clock import isoformat_z
from libs.process.listeners import Listeners, PortTaken
from libs.process.settings import EXIT_BAD_SETTINGS
from libs.suite.child_process import die_with_parent, port_is_taken
from libs.suite.installation import Installation
from libs.suite.mongod import (
    MongodMissing,
    MongodNotReady,
    await_primary,
    find_mongod,
    last_words,
    mongod_command,
    mongod_url,
)
from libs.suite.settings import CannotStart, SuiteSettings, locked_data_dir, service_environment

READY_TIMEOUT_SECONDS = 90.0
STOP_TIMEOUT_SECONDS = 60.0
STAGE_STOP_TIMEOUT_SECONDS = 26.0
MONGOD_STOP_TIMEOUT_SECONDS = 20.0
BACKOFF_SECONDS_MIN = 0.5
BACKOFF_SECONDS_MAX = 30.0
STEADY_AFTER_SECONDS = 10.0
QUEUE_SECONDS_MAX = 1.0
DEATHS_BEFORE_READY_MAX = 3
LOGS_KEPT_MAX = 3
LINE_SIZE_BYTES_MAX = 1024 * 1024
LEVELS = {
    "process_died": "error",
    "last_words": "error",
    "cannot_start": "error",
    "line_too_long": "warning",
    "killing": "warning",
}
"""Of our own lines, where something is wrong."""


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
        self._write_json("supervisor", event, LEVELS.get(event, "info"), text=text, **fields)

    def relay(self, service: str, line: str) -> None:
        """One line that a service wrote."""
        if self.readable:
            self._write(f"{service:<{self._width}} | {line}")
        elif line.startswith("{"):
            self._write(line)
        else:
            self._write_json(service, "output", "warning", line=line)

    def _write_json(self, service: str, event: str, level: str, **fields: object) -> None:
        """In the shape of the services' own lines."""
        time_ = isoformat_z(datetime.now(UTC))
        self._write(json.dumps({"event": event, **fields, "level": level, "timestamp": time_, "service": service}))

    def _write(self, line: str) -> None:
        # A closed terminal must not take the suite down with it.
        with suppress(OSError):
            print(line, file=self._stream, flush=True)


@dataclass
class Child:
    """One watched process.

    Args:
        command, environment: how it is started.
        log_path: where its output goes; None merges it into ours.
        listeners: where connections queue while it comes back. They are refused while it is away for longer, so that
            nobody waits for what may not come.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log_path: Path | None = None
    listeners: Listeners | None = None
    process: asyncio.subprocess.Process | None = field(default=None, init=False)
    exit_code: int | None = field(default=None, init=False)
    last_words: list[str] = field(default_factory=list, init=False)
    deaths: int = field(default=0, init=False)
    stopping: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.returncode is None

    async def run(self, output: Output) -> None:
        """Start it, and start it again when it ends, until it is told to stop.

        At once the first time, with exponential backoff while it does not stay.
        """
        backoff_seconds = 0.0
        while not self.stopping.is_set():
            started = time.monotonic()
            how = await self._run_once(output)
            if self.stopping.is_set():
                return
            if time.monotonic() - started > STEADY_AFTER_SECONDS:
                backoff_seconds = 0.0
            if self.exit_code == EXIT_BAD_SETTINGS:
                backoff_seconds = BACKOFF_SECONDS_MAX
            self.deaths += 1
            pause = f"in {backoff_seconds:g} s" if backoff_seconds else "at once"
            output.say(
                "process_died",
                f"{self.name} {how}; starting it again {pause}",
                process=self.name,
                exit_code=self.exit_code,
                backoff_seconds=backoff_seconds,
            )
            self._tell_last_words(output)
            if self.listeners is not None and backoff_seconds > QUEUE_SECONDS_MAX:
                self.listeners.close()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), backoff_seconds)
            backoff_seconds = min(max(backoff_seconds * 2, BACKOFF_SECONDS_MIN), BACKOFF_SECONDS_MAX)

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

    def _tell_last_words(self, output: Output) -> None:
        for words in self.last_words:
            output.say("last_words", f"{self.name} said: {words}", process=self.name, words=words)

    async def _run_once(self, output: Output) -> str:
        """Start it and wait for its end; tells how it ended."""
        if self.listeners is not None:
            try:
                self.listeners.open()
            except (PortTaken, OSError) as error:
                return f"can't listen: {error}"
        log = self.log_path.open("ab") if self.log_path else None
        written_before = log.tell() if log is not None else 0
        environment = dict(self.environment)
        descriptors: tuple[int, ...] = ()
        if self.listeners is not None:
            descriptors = self.listeners.descriptors
            environment["INHERITED_SOCKETS"] = ",".join(map(str, descriptors))
        try:
            # A session of its own: Ctrl-C on the terminal reaches us alone, and we stop things in their order.
            self.process = await asyncio.create_subprocess_exec(
                *self.command,
                env=environment,
                pass_fds=descriptors,
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
        self.exit_code = await self.process.wait()
        if self.log_path is not None:
            self.last_words = last_words(self.log_path, written_before)
        return _how_it_ended(self.exit_code)

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

    def __init__(
        self, settings: SuiteSettings, installation: Installation, listeners: Mapping[str, Listeners], output: Output
    ) -> None:
        self._settings = settings
        self._installation = installation
        self._directory = installation.directory
        self._keys = installation.keys
        self._listeners = listeners
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
                exit_code = error.exit_code
            finally:
                await self._stop_all()
        return exit_code

    async def _run(self, tasks: asyncio.TaskGroup) -> None:
        self._output.say("starting", f"starting, with the data in {self._directory.resolve()}")
        mongodb_url = self._settings.external_mongodb_url or await self._start_mongod(tasks)
        for service in self._settings.services:
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
        _rotate(log_path)
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
            said = "".join(f"\n  mongod said: {words}" for words in child.last_words)
            raise CannotStart(f"{error}; see {log_path.resolve()}{said}") from None
        return mongod_url(port)

    def _child_of(self, service: Service, mongodb_url: str) -> Child:
        environment = service_environment(service, self._settings, self._keys, mongodb_url)
        environment |= {
            "PYTHONUNBUFFERED": "1",
            "LOG_FORMAT": "console" if self._output.readable else "json",
            "INSTANCE": self._installation.instance,
            "DATA_DIR": str(self._directory.resolve()),
        }
        command = (sys.executable, "-P", "-m", f"services.{service.name}")
        return Child(service.name, command, environment, listeners=self._listeners[service.name])

    async def _become_ready(self) -> bool:
        """Wait until every service is; False when we were told to stop meanwhile."""
        deadline = time.monotonic() + READY_TIMEOUT_SECONDS
        waiting = {service.name: f"{self._settings.url_of(service)}/readyz" for service in self._settings.services}
        while waiting:
            # One at a time, the gateway last: it asks the others each time that it is asked.
            name, url = next(iter(waiting.items()))
            if await asyncio.to_thread(answers_200, url):
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
            if child.deaths and child.exit_code == EXIT_BAD_SETTINGS:
                raise CannotStart(f"{child.name} has bad settings, which are named above", EXIT_BAD_SETTINGS)
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
        for stage in sorted({service.stop_stage for service in self._settings.services}):
            names = [service.name for service in self._settings.services if service.stop_stage == stage]
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
    with locked_data_dir(settings) as directory, opened_listeners(settings) as listeners:
        installation = Installation.of(directory, settings)
        return asyncio.run(Supervisor(settings, installation, listeners, output).run())


@contextmanager
def opened_listeners(settings: SuiteSettings) -> Iterator[Mapping[str, Listeners]]:
    """Every service's port, held from before the first process starts until the last has ended.

    Raises:
        CannotStart: names every port that is taken, mongod's too, and the setting that moves it.
    """
    services = settings.services
    listeners = {service.name: Listeners(settings.host_of(service), settings.port_of(service)) for service in services}
    taken = []
    try:
        for service in services:
            try:
                listeners[service.name].open()
            except PortTaken:
                taken.append((service.port_setting, settings.port_of(service)))
            except OSError as error:
                raise CannotStart(f"HOST: can't listen on {settings.host_of(service)}: {error.strerror}") from None
        if settings.external_mongodb_url is None and port_is_taken("127.0.0.1", settings.mongodb_port):
            taken.append(("mongodb_port", settings.mongodb_port))
        if taken:
            ports = "; ".join(f"port {port} is taken (set {name.upper()} to use another)" for name, port in taken)
            raise CannotStart(f"{ports}. Another DataSync may be running on this machine.")
        yield listeners
    finally:
        for opened in listeners.values():
            opened.close()


def _rotate(path: Path) -> None:
    """Keep what the last few processes wrote."""
    for number in range(LOGS_KEPT_MAX - 1, 0, -1):
        older = path.with_name(f"{path.name}.{number}")
        if older.exists():
            older.replace(path.with_name(f"{path.name}.{number + 1}"))
    if path.exists():
        path.replace(path.with_name(f"{path.name}.1"))


# The environment's proxy can't reach services of this machine.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def answers_200(url: str) -> bool:
    """Whether a URL of this machine answers 200."""
    try:
        with _DIRECT.open(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _how_it_ended(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"
