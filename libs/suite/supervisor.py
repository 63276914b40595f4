"""``datasync up``: the whole suite on one machine, with one process per service."""

import asyncio
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from libs.contracts.services import Service
from libs.process.listeners import Listeners, PortTaken
from libs.process.settings import EXIT_BAD_SETTINGS
from libs.suite.child import Child
from libs.suite.child_process import port_is_taken
from libs.suite.installation import Installation
from libs.suite.mongod import (
    MongodMissing,
    MongodNotReady,
    await_primary,
    find_mongod,
    mongod_command,
    mongod_url,
)
from libs.suite.output import Output
from libs.suite.settings import CannotStart, SuiteSettings, locked_data_dir, service_environment

READY_TIMEOUT_SECONDS = 90.0
STOP_TIMEOUT_SECONDS = 60.0
STAGE_STOP_TIMEOUT_SECONDS = 26.0
MONGOD_STOP_TIMEOUT_SECONDS = 20.0
DEATHS_BEFORE_READY_MAX = 3
LOGS_KEPT_MAX = 3


def up(settings: SuiteSettings) -> int:
    """Run the suite until a signal stops it; returns the exit code.

    Raises:
        CannotStart: the data directory or a port is taken.
    """
    readable = sys.stdout.isatty() if settings.log_format == "auto" else settings.log_format == "console"
    output = Output(sys.stdout, readable=readable)
    with locked_data_dir(settings) as directory, opened_listeners(settings) as listeners:
        installation = Installation.of(directory, settings)
        return asyncio.run(Supervisor(settings, installation, listeners, output).run())


class Supervisor:
    """Starts the services, and mongod if needed, and stops them in order."""

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
        """Start everything, wait for a signal, stop everything; returns the exit code."""
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
            raise CannotStart(f"{error}; or set MONGODB_URL to an existing replica set") from None
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
            reported = "".join(f"\n  mongod logged: {words}" for words in child.last_words)
            raise CannotStart(f"{error}; see {log_path.resolve()}{reported}") from None
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
        """Wait until every service is ready; False if a signal stops the suite first."""
        deadline = time.monotonic() + READY_TIMEOUT_SECONDS
        waiting = {service.name: f"{self._settings.url_of(service)}/readyz" for service in self._settings.services}
        while waiting:
            # One at a time and the gateway last, since its readiness check calls the other services.
            name, url = next(iter(waiting.items()))
            if await asyncio.to_thread(answers_200, url):
                del waiting[name]
                continue
            if self._stop_requested.is_set():
                return False
            self._fail_if_one_keeps_ending()
            if time.monotonic() > deadline:
                raise CannotStart(f"not ready after {READY_TIMEOUT_SECONDS:g} seconds: {', '.join(sorted(waiting))}")
            await asyncio.sleep(0.1)
        return True

    def _fail_if_one_keeps_ending(self) -> None:
        for child in self._services.values():
            if child.deaths and child.exit_code == EXIT_BAD_SETTINGS:
                raise CannotStart(f"{child.name} has bad settings; see above", EXIT_BAD_SETTINGS)
            if child.deaths >= DEATHS_BEFORE_READY_MAX:
                raise CannotStart(f"{child.name} ended {child.deaths} times while it was starting; see above")

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
        self._output.say("killing", "second signal: killing every process")
        for child in (*self._services.values(), *((self._mongod,) if self._mongod else ())):
            child.kill()

    async def _stop_all(self) -> None:
        self._output.say("stopping", "stopping")
        deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
        for child in self._services.values():
            # A service that ends from now on is not restarted.
            child.stopping.set()
        for stage in sorted({service.stop_stage for service in self._settings.services}):
            names = [service.name for service in self._settings.services if service.stop_stage == stage]
            children = [self._services[name] for name in names if name in self._services]
            left_seconds = max(2.0, min(STAGE_STOP_TIMEOUT_SECONDS, deadline - time.monotonic()))
            await asyncio.gather(*(child.stop(left_seconds) for child in children))
        if self._mongod is not None:
            await self._mongod.stop(MONGOD_STOP_TIMEOUT_SECONDS)
        self._output.say("stopped", "stopped")


@contextmanager
def opened_listeners(settings: SuiteSettings) -> Iterator[Mapping[str, Listeners]]:
    """Listen on every service's port, until the last process has ended.

    Raises:
        CannotStart: names every port that is taken, including mongod's, and the setting that changes it.
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
            ports = "; ".join(f"port {port} is in use (set {name.upper()} to use another)" for name, port in taken)
            raise CannotStart(f"{ports}. Another DataSync may be running on this machine.")
        yield listeners
    finally:
        for opened in listeners.values():
            opened.close()


def _rotate(path: Path) -> None:
    """Keep the logs of the last few processes."""
    for number in range(LOGS_KEPT_MAX - 1, 0, -1):
        older = path.with_name(f"{path.name}.{number}")
        if older.exists():
            older.replace(path.with_name(f"{path.name}.{number + 1}"))
    if path.exists():
        path.replace(path.with_name(f"{path.name}.1"))


# A proxy in the environment can't reach services on this machine.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def answers_200(url: str) -> bool:
    """Whether a URL on this machine answers 200."""
    try:
        with _DIRECT.open(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
