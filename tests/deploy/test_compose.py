"""The Compose file on a real Docker engine: up, the walk of the README, several of a service, down."""

import json
import os
import shutil
import subprocess
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from deploy.testing.cluster import run, until
from libs.contracts.services import SERVICES
from libs.suite.child_process import free_port
from libs.testing.pages import ROOT, adapted, blocks, follow
from tests.deploy.conftest import SERVICE_IMAGE

pytestmark = [pytest.mark.timeout(1200), pytest.mark.usefixtures("engine")]

PAGE = "docs/operations/docker.md"
API_KEY = "datasync-compose"


@dataclass(frozen=True)
class Project:
    """A project of Compose with ports and a directory of its own."""

    command: tuple[str, ...]
    environment: dict[str, str]

    def up(self) -> None:
        """Start what does not run yet, and wait until every gateway answers."""
        self("up", "--detach")
        self.await_gateways()

    def await_gateways(self) -> None:
        until(lambda: all(answers(gateway) for gateway in self.gateways), "every gateway answers")

    def __call__(self, *arguments: str) -> str:
        return run(*self.command, *arguments, environment=self.environment)

    def follow(self, script: str, instead: Mapping[str, str] | None = None, **values: str) -> str:
        """Run commands of a page; returns what they printed."""
        # The first Compose asks for a terminal unless it is told that there is none.
        command = " ".join(self.command)
        script = adapted(script, instead, **values).replace("docker compose exec", "docker compose exec -T")
        script = script.replace("docker compose", command)
        done = follow(script, self.environment, timeout_seconds=300)
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
        "COMPOSE_FILE": str(ROOT / "docker-compose.yml"),
        "DATASYNC_IMAGE": SERVICE_IMAGE,
        "DATASYNC_PORTS": f"{port}-{port + 9}",
        "SAMPLE_SOURCE_PORT": str(free_port()),
        "SAMPLE_DESTINATION_PORT": str(free_port()),
        "PROMETHEUS_PORT": str(free_port()),
        "DATASYNC_LAKE": str(lake),
    }
    found = Project(compose, environment)
    [start, *_] = blocks(PAGE, "Compose")
    try:
        # The images are there.
        found.follow(start, {" --build": ""})
        found.await_gateways()
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
    [_, variables, _] = blocks(PAGE, "Compose")
    walk = adapted("".join(blocks("README.md")), DATASYNC=gateway_of(project))
    lake = {"/tmp/datasync-lake": project.environment["DATASYNC_LAKE"]}
    printed = project.follow(adapted(variables, lake) + walk)
    assert '"verified":true' in printed
    assert printed.splitlines()[-1] == "26115 rows"


def test_services_can_be_scaled_operated_and_stopped(project: Project) -> None:
    """The last block of the page; what follows a stop is the next test."""
    scale, operate, stop = blocks(PAGE, "Compose")[2].split("\n\n")
    project.follow(scale)
    project.await_gateways()
    assert len(project("ps", "-q", "worker").split()) == 3
    first, second = project.gateways
    assert jobs(first) == jobs(second) == 1
    assert project.follow(operate) == ""
    project.follow(stop)
    assert project("ps", "-q") == ""


def test_data_and_keys_outlive_a_restart(project: Project) -> None:
    """The stored password is decrypted with the key of the first start."""
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


def test_prometheus_reads_every_instance(project: Project) -> None:
    image = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["prometheus"]["image"]
    if subprocess.run(["docker", "image", "inspect", image], capture_output=True, check=False).returncode:
        pytest.skip(f"the engine has no image {image}")
    project("--profile", "observability", "up", "--detach", "prometheus")
    project("up", "--detach", "--scale", "worker=2", "worker")
    expected = {service.name: 1 + (service.name == "worker") for service in SERVICES}

    def read() -> dict[str, int]:
        url = f"http://127.0.0.1:{project.environment['PROMETHEUS_PORT']}/api/v1/query?query=count+by(component)(up==1)"
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                found = json.load(response)["data"]["result"]
        except OSError:
            return {}
        return {one["metric"]["component"]: int(one["value"][1]) for one in found}

    until(lambda: read() == expected, "Prometheus reads every instance")
    project("--profile", "observability", "rm", "--stop", "--force", "prometheus")


def test_a_backup_is_put_back_by_the_commands_of_its_page(project: Project, tmp_path: Path) -> None:
    backup, restore = blocks("docs/operations/backup.md", "Compose")
    image = {"datasync-service:dev": SERVICE_IMAGE}
    project.follow(backup, image, PROJECT=project.environment["COMPOSE_PROJECT_NAME"], BACKUP=str(tmp_path))
    project.up()
    assert jobs(gateway_of(project)) == 1
    project("down", "--volumes", "--timeout", "30")
    project.follow(f"BACKUP={tmp_path}\n{restore}", image)
    project.await_gateways()
    assert jobs(gateway_of(project)) == 1
    assert can_connect_to_its_source(gateway_of(project))


def gateway_of(project: Project) -> str:
    [gateway] = project.gateways
    return gateway
