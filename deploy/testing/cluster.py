"""A Kubernetes cluster to test the chart on: whatever ``KUBECONFIG`` points to, with ``kubectl`` and ``helm``.

Images are not pulled: ``LOAD_IMAGE`` is a command that loads one into the cluster's nodes, such as ``kind load
docker-image``; the image's name is appended.
"""

import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHART = Path(__file__).parents[2] / "helm/datasync"
TIMEOUT = "5m"


class CommandFailed(AssertionError):
    """A command ended with another exit code than 0; the message has its output."""


def run(
    *command: str,
    timeout_seconds: float = 400,
    input_text: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """The standard output of a command; raises ``CommandFailed``."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_seconds, input=input_text, env=environment, check=False
    )
    if done.returncode:
        raise CommandFailed(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def until(condition: Callable[[], bool], what: str, timeout_seconds: float = 180) -> None:
    """Wait until the condition holds; raises ``AssertionError`` with what was waited for."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_seconds} s: {what}"
        time.sleep(1)


def missing_parts() -> str | None:
    """Why no cluster can be used; None if one can."""
    for tool in ("kubectl", "helm"):
        if shutil.which(tool) is None:
            return f"{tool} is not on the PATH"
    if not os.environ.get("KUBECONFIG"):
        return "KUBECONFIG is not set"
    if subprocess.run(["kubectl", "get", "nodes"], capture_output=True, timeout=30, check=False).returncode:
        return f"the cluster of {os.environ['KUBECONFIG']} does not answer"
    return None


def load_image(image: str) -> None:
    if command := os.environ.get("LOAD_IMAGE"):
        run(*shlex.split(command), image)


@dataclass(frozen=True)
class Release:
    """A release of the chart in a namespace of its own."""

    namespace: str
    name: str = "datasync"

    def install(self, *arguments: str) -> None:
        self._helm("install", *arguments)

    def upgrade(self, *arguments: str) -> None:
        self._helm("upgrade", *arguments)

    def test(self) -> None:
        run("helm", "test", self.name, "-n", self.namespace, "--timeout", TIMEOUT)

    def uninstall(self) -> None:
        run("helm", "uninstall", self.name, "-n", self.namespace, "--wait", "--timeout", TIMEOUT)

    def _helm(self, action: str, *arguments: str) -> None:
        run(
            "helm", action, self.name, str(CHART), "-n", self.namespace, "--wait", "--timeout", TIMEOUT, *arguments
        )  # fmt: skip

    def kubectl(self, *arguments: str, input_text: str | None = None) -> str:
        return run("kubectl", "-n", self.namespace, *arguments, input_text=input_text)

    def items(self, kind: str, selector: str = "") -> list[dict[str, Any]]:
        arguments = ["-l", selector] if selector else []
        found: list[dict[str, Any]] = json.loads(self.kubectl("get", kind, "-o", "json", *arguments))["items"]
        return found

    def pods(self, component: str) -> list[str]:
        """The names of a component's pods that are not being deleted."""
        pods = self.items("pods", f"app.kubernetes.io/instance={self.name},app.kubernetes.io/component={component}")
        return [pod["metadata"]["name"] for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    def python(self, pod: str, script: str, *arguments: str) -> str:
        """Run a script in a pod of one of the services; returns what it printed."""
        return self.kubectl("exec", pod, "--", "/opt/datasync/bin/python", "-c", script, *arguments)
