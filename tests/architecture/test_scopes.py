"""No route of a service is forgotten in the table of scopes."""

import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
from aiohttp import web

from libs.core.scopes import SCOPES
from libs.web.openapi import DescribedRoute, template_of
from libs.web.operational import PUBLIC_PATHS
from libs.web.scopes import scope_of
from tests.architecture.source import ROOT, services

WITH_PUBLIC_ROUTES = [service for service in services() if service not in ("gateway", "worker", "dashboard")]


def routes_of(service: str) -> Iterator[web.RouteDef]:
    """What the classes with a method ``routes`` declare; nothing is called, so that no part needs to be there."""
    for path in sorted((ROOT / "services" / service).glob("*http*.py")):
        module = importlib.import_module(f"services.{service}.{path.stem}")
        declared: Any
        for _, declared in inspect.getmembers(module, inspect.isclass):
            if declared.__module__ == module.__name__ and hasattr(declared, "routes"):
                names = [field.name for field in dataclasses.fields(declared)]
                yield from declared(**{name: "source" if name == "role" else MagicMock() for name in names}).routes()


@pytest.mark.parametrize("service", WITH_PUBLIC_ROUTES)
def test_every_route_needs_a_scope_that_credentials_can_hold(service: str) -> None:
    public = [route for route in routes_of(service) if not route.path.startswith("/internal/")]
    assert public
    needed = {}
    for route in public:
        assert isinstance(route, DescribedRoute), route
        changes = route.operation.changes
        needed[route.method, route.path] = scope_of(template_of(route.path), changes=changes)
    forgotten = [
        route
        for route, scope in needed.items()
        if route[1] not in PUBLIC_PATHS and scope is not None and scope not in SCOPES
    ]
    assert forgotten == []
