"""Services talk to each other through the declared internal calls only, and never more than one deep."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from libs.contracts import internal
from libs.contracts.internal import CALLS, InternalCall
from tests.architecture.source import ROOT, calls, functions, name_of, python_files, services, tree_of

DECLARED = {name: value for name, value in vars(internal).items() if isinstance(value, InternalCall)}


def _made_in(path: Path) -> Iterator[str]:
    """The declared calls that a file makes: ``client.call(CLAIM_WORK, …)``."""
    for call in calls(tree_of(path)):
        if name_of(call.func) == "call" and call.args and name_of(call.args[0]) in DECLARED:
            yield name_of(call.args[0])


def _answered_in(path: Path) -> Iterator[tuple[str, str]]:
    """The declared calls that a file answers, and the names of their handlers."""
    for call in calls(tree_of(path)):
        if name_of(call.func) == "internal_route" and len(call.args) == 2:
            yield name_of(call.args[0]), name_of(call.args[1])


def test_the_list_of_calls_is_complete() -> None:
    assert sorted(CALLS, key=lambda call: call.path) == sorted(DECLARED.values(), key=lambda call: call.path)
    assert len({call.path for call in CALLS}) == len(CALLS)
    assert all(call.path.startswith("/internal/") for call in CALLS)


@pytest.mark.parametrize("name", sorted(DECLARED))
def test_a_call_is_answered_by_its_service_and_made_by_its_callers_only(name: str) -> None:
    answering, calling = set(), set()
    for service in services():
        for path in python_files(f"services/{service}"):
            answering |= {service for answered, _ in _answered_in(path) if answered == name}
            calling |= {service for made in _made_in(path) if made == name}
    assert answering == {DECLARED[name].service}
    assert calling <= set(DECLARED[name].callers)


@pytest.mark.parametrize("service", services())
def test_whoever_answers_a_call_makes_none(service: str) -> None:
    """Follows names through the service's own functions, which reaches at least whatever the handler reaches."""
    called: dict[str, set[str]] = {}
    making: dict[str, set[str]] = {}
    for path in python_files(f"services/{service}"):
        for function in functions(path):
            called.setdefault(function.name, set()).update(name_of(call.func) for call in calls(function))
            making.setdefault(function.name, set()).update(
                name_of(call.args[0])
                for call in calls(function)
                if name_of(call.func) == "call" and call.args and name_of(call.args[0]) in DECLARED
            )
    for path in python_files(f"services/{service}"):
        for answered, handler in _answered_in(path):
            reached, waiting = set[str](), [handler]
            while waiting:
                function_name = waiting.pop()
                if function_name in called and function_name not in reached:
                    reached.add(function_name)
                    waiting += called[function_name]
            made = {name for function_name in reached for name in making[function_name]}
            assert not made, f"{service} answers {answered} ({path.relative_to(ROOT)}) by calling {made}"
