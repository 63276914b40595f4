"""Every event's model and its message in ``proto/datasync/v1`` agree, field by field and on the JSON that travels."""

import copy
import json
import types
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from google.protobuf import json_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from libs.contracts import auth, catalog, jobs, records, runs
from libs.contracts.topics import OWNERS
from libs.core.envelope import Event
from libs.event_log.cloudevents import message_name
from libs.testing import protobuf

EVENTS: tuple[type[Event], ...] = (*auth.EVENTS, *catalog.EVENTS, *jobs.EVENTS, *records.EVENTS, *runs.EVENTS)
INT32 = st.integers(-(2**31), 2**31 - 1)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
EXACT_IN_DOUBLE = st.integers(-(2**53), 2**53)


SCHEMAS = protobuf.compile_schemas()
DESCRIBED = protobuf.describe(SCHEMAS)
MESSAGES = protobuf.message_classes(SCHEMAS)


def expected_types(annotation: Any) -> tuple[str, set[str]]:
    """The label and the types that a field of this annotation may have; no int64, which JSON turns into a string."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        (inner,) = [item for item in get_args(annotation) if item is not type(None)]
        return "optional", expected_types(inner)[1]
    if origin is tuple:
        return "repeated", expected_types(get_args(annotation)[0])[1]
    if origin is Literal:
        return "", {"string"}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "", {f"datasync.v1.{annotation.__name__}"}
    known: dict[Any, set[str]] = {
        str: {"string"},
        bool: {"bool"},
        int: {"int32", "double"},
        float: {"double"},
        datetime: {"google.protobuf.Timestamp"},
    }
    return "", known[annotation]


def disagreements(model: type[BaseModel]) -> list[str]:
    """What a model says that its message does not, and the other way round; nested models included."""
    fields = {name: field for name, field in DESCRIBED[model.__name__].items() if name != "reserved"}
    found = [f"{model.__name__}.{name} differs" for name in fields.keys() ^ model.model_fields.keys()]
    for name in fields.keys() & model.model_fields.keys():
        label, allowed = expected_types(model.model_fields[name].annotation)
        if fields[name]["label"] != label or fields[name]["type"] not in allowed:
            found.append(f"{model.__name__}.{name} is {fields[name]}, wanted {label} {allowed}")
        for inner in get_args(model.model_fields[name].annotation):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                found += disagreements(inner)
    return found


def values_of(annotation: Any, field: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Values of a field that its message can hold."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        (inner,) = [item for item in get_args(annotation) if item is not type(None)]
        return st.none() | values_of(inner, field)
    if origin is tuple:
        return st.lists(values_of(get_args(annotation)[0], field), max_size=3).map(tuple)
    if origin is Literal:
        return st.sampled_from(get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return instances_of(annotation)
    known: dict[Any, st.SearchStrategy[Any]] = {
        str: st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=20),
        bool: st.booleans(),
        int: INT32 if field["type"] == "int32" else EXACT_IN_DOUBLE,
        float: st.floats(allow_nan=False, allow_infinity=False),
        datetime: st.integers(0, 253_000_000_000_000).map(lambda ms: EPOCH + timedelta(milliseconds=ms)),
    }
    return known[annotation]


def instances_of(model: type[BaseModel]) -> st.SearchStrategy[BaseModel]:
    fields = DESCRIBED[model.__name__]
    return st.builds(
        model,
        **{name: values_of(field.annotation, fields[name]) for name, field in model.model_fields.items()},
    )


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.TYPE)
def test_every_event_has_a_message_with_the_same_fields(event: type[Event]) -> None:
    assert event.__name__ == message_name(event.TYPE), "the dataschema attribute names the message by the event's type"
    assert event.TOPIC in OWNERS
    assert disagreements(event) == []


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_json_of_an_event_survives_the_way_through_its_message(data: st.DataObject) -> None:
    """Read as protobuf's JSON, serialised in binary, printed as protobuf's JSON and read back: the same event."""
    event_type = data.draw(st.sampled_from(EVENTS))
    event = data.draw(instances_of(event_type))
    message = json_format.Parse(event.model_dump_json(), MESSAGES[event_type.__name__]())
    again = type(message).FromString(message.SerializeToString())
    printed = json_format.MessageToJson(
        again, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    assert event_type.model_validate_json(printed) == event


def test_the_schemas_are_compatible_with_the_released_ones() -> None:
    released = json.loads(protobuf.RELEASED.read_text())
    assert protobuf.incompatibilities(released, DESCRIBED) == []


def test_no_message_has_a_type_that_json_carries_otherwise() -> None:
    allowed = {"string", "bool", "int32", "double", "google.protobuf.Timestamp"}
    for name, fields in DESCRIBED.items():
        for field, shape in fields.items():
            if field != "reserved":
                assert shape["type"] in allowed or shape["type"].startswith("datasync.v1."), f"{name}.{field}"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda message: message.pop("name"), "SourceCreated.name is gone"),
        (lambda message: message["name"].update(number=9), "SourceCreated.name was string = 1 and is string = 9"),
        (lambda message: message["name"].update(type="bytes"), "and is bytes = 1"),
        (lambda message: message["name"].update(label="repeated"), "and is repeated string = 1"),
    ],
)
def test_a_change_that_readers_would_stumble_over_is_found(change: Any, reason: str) -> None:
    present = copy.deepcopy(DESCRIBED)
    change(present["SourceCreated"])
    (found,) = protobuf.incompatibilities(DESCRIBED, present)
    assert reason in found


def test_a_new_field_and_a_removed_one_that_is_reserved_are_compatible() -> None:
    present = copy.deepcopy(DESCRIBED)
    present["SourceCreated"]["colour"] = {"number": 77, "type": "string", "label": "optional"}
    del present["SourceCreated"]["name"]
    present["SourceCreated"]["reserved"] = {"numbers": [1], "names": ["name"]}
    assert protobuf.incompatibilities(DESCRIBED, present) == []
