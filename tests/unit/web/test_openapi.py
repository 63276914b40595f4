"""What is derived from a described route."""

from typing import Annotated, Any

import pytest
from aiohttp import web
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from libs.web.calls import Call
from libs.web.openapi import Content, merged, part_of, template_of
from libs.web.routes import route


class Filter(BaseModel):
    name: str
    limit: int = Field(default=50, ge=1, le=100, description="How many.")
    after: int | None = None


class ThingBody(BaseModel):
    name: str = Field(examples=["shop"])
    note: str = ""


class ThingShown(TypedDict):
    id: Annotated[int, Field(examples=[7])]
    name: Annotated[str, Field(examples=["shop"])]


async def handle(call: Call) -> web.Response:
    """Does what it says.

    At length.
    """
    return web.Response()


def operation(path: str, method: str = "get", **fields: Any) -> dict[str, Any]:
    """What the document says of one route."""
    part = part_of([route(method.upper(), path, handle, "A thing", tag="Things", **fields)], {"/login"})
    [item] = part["paths"].values()
    found: dict[str, Any] = item[method]
    return found


@pytest.mark.parametrize(
    ("path", "template"),
    [
        ("/jobs", "/jobs"),
        ("/jobs/{id}", "/jobs/{id}"),
        (r"/jobs/{id:\d+}/logs", "/jobs/{id}/logs"),
        (r"/things/{id:[0-9a-f]{8}}/{part:(?:a|b)}", "/things/{id}/{part}"),
        ("/jobs/dest_id={dest_id:.*}", "/jobs/dest_id={dest_id}"),
    ],
)
def test_a_routes_path_becomes_a_template(path: str, template: str) -> None:
    assert template_of(path) == template


def test_parameters_come_from_the_path_and_the_query_model() -> None:
    found = operation(r"/things/{id:\d+}", query=Filter)
    assert [(item["in"], item["name"], item.get("required")) for item in found["parameters"]] == [
        ("path", "id", True),
        ("query", "name", True),
        ("query", "limit", False),
        ("query", "after", False),
    ]
    schemas = [item["schema"] for item in found["parameters"]]
    assert schemas[0] == {"type": "integer", "minimum": 0}
    assert schemas[2] == {"type": "integer", "default": 50, "minimum": 1, "maximum": 100}
    assert schemas[3] == {"type": "integer"}, "a parameter can't be null"


def test_the_project_family_answers_in_its_envelope_and_others_do_not() -> None:
    enveloped = operation("/api/v1/things", answer=ThingShown)["responses"]["200"]["content"]["application/json"]
    assert enveloped["schema"]["required"] == ["success", "message", "data"]
    assert enveloped["example"] == {"success": True, "message": "", "data": {"id": 7, "name": "shop"}}
    plain = operation("/api/v2/things", answer=ThingShown)["responses"]["200"]["content"]["application/json"]
    assert plain["schema"] == {"$ref": "#/components/schemas/ThingShown"}


@pytest.mark.parametrize(
    ("fields", "statuses"),
    [
        ({}, set()),
        ({"body": ThingBody}, {"408", "413", "415"}),
        ({"conditional": True}, {"412"}),
        ({"idempotent": True}, {"409", "422"}),
        ({"refuses": (409,)}, {"409"}),
    ],
)
def test_refusals_follow_from_what_a_route_takes(fields: dict[str, Any], statuses: set[str]) -> None:
    always = {"200", "400", "401", "403", "429", "500", "503", "504"}
    assert set(operation("/api/v1/things", "post", answer=ThingShown, **fields)["responses"]) == always | statuses


def test_a_public_route_needs_no_credential() -> None:
    found = operation("/login", "post", body=ThingBody, answer=ThingShown)
    assert found["security"] == []
    assert "403" not in found["responses"]


@pytest.mark.parametrize(
    ("path", "media_types"),
    [
        ("/api/v1/things", {"application/json", "application/problem+json"}),
        ("/api/v2/things", {"application/json", "application/problem+json"}),
        ("/api/v1/sync/things", {"application/problem+json"}),
    ],
)
def test_errors_have_the_shape_of_their_family(path: str, media_types: set[str]) -> None:
    part = part_of([route("GET", path, handle, "A thing", tag="Things", answer=ThingShown)], ())
    refusals = part["components"]["responses"].values()
    assert all(set(refusal["content"]) == media_types for refusal in refusals)


def test_the_handlers_first_paragraph_is_the_description() -> None:
    assert operation("/api/v1/things")["description"] == "Does what it says."


def test_an_answer_may_come_in_several_media_types() -> None:
    stream = Content("A stream", str, "text/event-stream")
    answer = operation("/api/v2/things", answer=ThingShown, also={200: stream})["responses"]["200"]
    assert set(answer["content"]) == {"application/json", "text/event-stream"}


def test_only_what_is_referred_to_is_a_component() -> None:
    routes = [route("GET", "/api/v2/things", handle, "A thing", tag="Things", query=Filter, answer=ThingShown)]
    assert set(part_of(routes, ())["components"]["schemas"]) == {"ThingShown", "V2Error", "FieldErrorShown", "Problem"}


def test_merging_keeps_the_first_word_and_loses_nothing() -> None:
    name = Annotated[str, Field(examples=["a"])]
    first = part_of([route("GET", "/a", handle, "First", tag="A", answer=name)], ())
    second = part_of(
        [
            route("GET", "/a", handle, "Second", tag="B", answer=name),
            route("POST", "/a", handle, "Another", tag="B", answer=name),
        ],
        (),
    )
    document = merged([first, second], version="1")
    assert {method: item["summary"] for method, item in document["paths"]["/a"].items()} == {
        "get": "First",
        "post": "Another",
    }
    assert [tag["name"] for tag in document["tags"]] == ["A", "B"]
    assert merged([first, second], version="1") == document
