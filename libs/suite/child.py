"""One process of the suite, restarted when it ends."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from libs.process.listeners import Listeners, PortTaken
from libs.process.settings import EXIT_BAD_SETTINGS
from libs.suite.child_process import die_with_parent
from libs.suite.mongod import last_words
from libs.suite.output import Output

BACKOFF_SECONDS_MIN = 0.5
BACKOFF_SECONDS_MAX = 30.0
STEADY_AFTER_SECONDS = 10.0
QUEUE_SECONDS_MAX = 1.0
LINE_SIZE_BYTES_MAX = 1024 * 1024


@dataclass
class Child:
    """A process that is restarted when it ends.

    Args:
        log_path: the file for its output; None merges it into the suite's.
        listeners: its listening sockets. Connections queue there during a short restart. They are closed, so that
            connections are refused, if the process does not stay up.
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
        """Start it, and restart it when it ends, until ``stop``.

        The first restart is immediate; later ones back off exponentially until the process stays up.
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
            pause = f"in {backoff_seconds:g} s" if backoff_seconds else "immediately"
            output.say(
                "process_died",
                f"{self.name} {how}; restarting {pause}",
                process=self.name,
                exit_code=self.exit_code,
                backoff_seconds=backoff_seconds,
            )
            self._report_last_words(output)
            if self.listeners is not None and backoff_seconds > QUEUE_SECONDS_MAX:
                self.listeners.close()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), backoff_seconds)
            backoff_seconds = min(max(backoff_seconds * 2, BACKOFF_SECONDS_MIN), BACKOFF_SECONDS_MAX)

    async def stop(self, timeout_seconds: float) -> None:
        """Send SIGTERM, and SIGKILL if the process has not ended in time."""
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
        """Kill it and the processes that it started."""
        self.stopping.set()
        if self.process is not None and self.is_running:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    def _report_last_words(self, output: Output) -> None:
        for words in self.last_words:
            output.say("last_words", f"{self.name} logged: {words}", process=self.name, words=words)

    async def _run_once(self, output: Output) -> str:
        """Start it and wait until it ends; returns how it ended."""
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
            # In a session of its own it gets no SIGINT from Ctrl-C: the suite stops its services in order.
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
                output.say("line_too_long", f"{self.name} wrote a line that is too long to print", process=self.name)
                continue
            if not line:
                return
            output.relay(self.name, line.decode(errors="replace").rstrip())


def _how_it_ended(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"
