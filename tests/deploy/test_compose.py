"""The Compose file on a real Docker engine: up, the walk of the README, several of a service, down."""

import json
import os
import re
import shutil
import subprocess
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.testing.cluster import run, until
from libs.suite.child_process import free_port
from tests.deploy.conftest import SERVICE_IMAGE

pytestmark = [pytest.mark.timeout(1200), pytest.mark.usefixtures("engine")]

ROOT = Path(__file__).resolve().parents[2]
API_KEY = "datasync-compose"
CONFIG = {"host": "sample-source", "port": 5432, "database": "sample", "username": "postgres", "password": "sample"}


@dataclass(frozen=True)
class Project:
    """A project of Compose with ports and a directory of its own."""

    command: tuple[str, ...]
    environment: dict[str, str]

    def up(self, *arguments: str) -> None:
        """Start what does not run yet, and wait until every gateway answers."""
        self("up", "--detach", *arguments)
        until(lambda: all(answers(gateway) for gateway in self.gateways), "every gateway answers")

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self.command, *arguments], cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @property
    def gateways(self) -> list[str]:
        """The URLs of the gateways."""
        containers = self("ps", "-q", "gateway").split()
        addresses = [run("docker", "port", container, "8080/tcp").splitlines()[0] for container in containers]
        return [f"http://{address}" for address in addresses]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    compose = ("docker-compose",) if shutil.which("docker-compose") else ("docker", "compose")
    if subprocess.run([*compose, "version"], capture_output=True, check=False).returncode:
        pytest.skip("there is no docker compose")
    port = free_port()
    lake = tmp_path_factory.mktemp("lake")
    environment = {
        **os.environ,
        "COMPOSE_PROJECT_NAME": f"datasync-test-{uuid.uuid4().hex[:8]}",
        "DATASYNC_IMAGE": SERVICE_IMAGE,
        "DATASYNC_PORTS": f"{port}-{port + 9}",
        "SAMPLE_SOURCE_PORT": str(free_port()),
        "SAMPLE_DESTINATION_PORT": str(free_port()),
        "DATASYNC_LAKE": str(lake),
    }
    found = Project(compose, environment)
    try:
        found.up()
        yield found
    finally:
        found("down", "--volumes", "--timeout", "30")


def answers(gateway: str) -> bool:
    try:
        with urllib.request.urlopen(f"{gateway}/readyz", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def jobs(gateway: str) -> int:
    request = urllib.request.Request(
        f"{gateway}/api/v1/project/123/jobs", headers={"Authorization": f"Bearer {API_KEY}"}
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        return len(json.load(response)["data"])


def test_the_walk_of_the_readme_works_word_by_word(project: Project) -> None:
    script = "".join(re.findall(r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE))
    [gateway] = project.gateways
    script, count = re.subn(r"^DATASYNC=\S+", f"DATASYNC={gateway}", script, flags=re.MULTILINE)
    assert count == 1
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env={**os.environ, "CONFIG": json.dumps(CONFIG), "LAKE": project.environment["DATASYNC_LAKE"]},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert '"verified":true' in done.stdout
    assert done.stdout.splitlines()[-1] == "26115 rows"


def test_services_can_be_scaled(project: Project) -> None:
    project.up("--scale", "worker=3", "--scale", "gateway=2")
    assert len(project("ps", "-q", "worker").split()) == 3
    first, second = project.gateways
    assert jobs(first) == jobs(second) == 1


def test_data_and_keys_outlive_a_restart(project: Project) -> None:
    """The stored password is decrypted with the key of the first start."""
    project("down", "--timeout", "30")
    project.up()
    assert can_connect_to_its_source(gateway_of(project))


def can_connect_to_its_source(gateway: str) -> bool:
    """Whether the stored password of the walk's source can be decrypted and used."""
    headers = {"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{gateway}/api/v1/project/123/sources", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as response:
        [source] = json.load(response)["data"]
    body = {"type": "postgres", "version": source["version"], "config": json.loads(source["config"])}
    request = urllib.request.Request(
        f"{gateway}/api/v1/project/123/sources/test", json.dumps(body).encode(), headers=headers
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return bool(json.load(response)["data"]["connection_result"]["status"] == "SUCCEEDED")


def test_a_backup_is_put_back_by_the_commands_of_its_page(project: Project, tmp_path: Path) -> None:
    page = (ROOT / "docs/operations/backup.md").read_text()
    backup, restore = re.findall(r"^```sh\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    values = {
        r"^PROJECT=\S+": f"PROJECT={project.environment['COMPOSE_PROJECT_NAME']}",
        r"^BACKUP=\S+": f"BACKUP={tmp_path}",
        "docker compose": " ".join(project.command),
        "datasync-service:dev": SERVICE_IMAGE,
    }

    def follow(commands: str) -> None:
        for name, value in values.items():
            commands = re.sub(name, value, commands, flags=re.MULTILINE)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"BACKUP={tmp_path}\n{commands}"],
            cwd=ROOT, env=project.environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    follow(backup)
    project.up()
    assert jobs(gateway_of(project)) == 1
    project("down", "--volumes", "--timeout", "30")
    follow(restore)
    project.up()
    assert jobs(gateway_of(project)) == 1
    assert can_connect_to_its_source(gateway_of(project))


def gateway_of(project: Project) -> str:
    [gateway] = project.gateways
    return gateway
