"""The schemas in ``proto/datasync/v1`` are those of the event models, on the wire too, and stay compatible."""

import json
import sys
import types
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from google.protobuf import json_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from libs.contracts.registry import registered_events
from libs.contracts.topics import OWNERS
from libs.core.envelope import Event, Frozen
from libs.event_log.cloudevents import message_name
from libs.testing import protobuf
from libs.testing.walks import examples
from proto import generate
from proto.generate import SchemaError

EVENTS = [event for event in registered_events() if event.__module__.startswith("libs.contracts.")]
INT32 = st.integers(-(2**31), 2**31 - 1)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
EXACT_IN_DOUBLE = st.integers(-(2**53), 2**53)

LOCK: generate.Lock = json.loads(generate.LOCK.read_text())
SCHEMAS = protobuf.compile_schemas()
DECLARED = protobuf.declarations(SCHEMAS)
MESSAGES = protobuf.message_classes(SCHEMAS)


class LampLit(Frozen):
    """A lamp was lit."""

    room: str
    watts: int


def values_of(annotation: Any) -> st.SearchStrategy[Any]:
    """Values that a field of this annotation can have on the wire."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        (inner,) = [item for item in get_args(annotation) if item is not type(None)]
        return st.none() | values_of(inner)
    if origin is tuple:
        return st.lists(values_of(get_args(annotation)[0]), max_size=3).map(tuple)
    if origin is Literal:
        return st.sampled_from(get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return instances_of(annotation)
    known: dict[Any, st.SearchStrategy[Any]] = {
        str: st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=20),
        bool: st.booleans(),
        int: INT32,
        Annotated[int, "double"]: EXACT_IN_DOUBLE,
        float: st.floats(allow_nan=False, allow_infinity=False),
        datetime: st.integers(0, 253_000_000_000_000).map(lambda ms: EPOCH + timedelta(milliseconds=ms)),
    }
    return known[annotation]


def instances_of(model: type[BaseModel]) -> st.SearchStrategy[BaseModel]:
    annotations = get_type_hints(model, include_extras=True)
    return st.builds(model, **{name: values_of(annotations[name]) for name in model.model_fields})


def changed(fields: dict[str, Any], doc: str = "A lamp was lit.") -> type[Frozen]:
    """``LampLit`` as another version of the code has it: the annotation of each field, or that and a default."""
    annotations = {name: field[0] if isinstance(field, tuple) else field for name, field in fields.items()}
    defaults = {name: field[1] for name, field in fields.items() if isinstance(field, tuple)}
    namespace = {"__doc__": doc, "__module__": __name__, "__annotations__": annotations, **defaults}
    return type("LampLit", (Frozen,), namespace)


def declared(text: str, folder: Path) -> protobuf.Declarations:
    """What protoc makes of a schema's text."""
    (folder / "lamps.proto").write_text(text)
    return protobuf.declarations(protobuf.compile_schemas(folder))


def schema_of(model: type[Frozen], lock: generate.Lock) -> str:
    return generate.schema(sys.modules[__name__], [model], lock)


def test_the_schemas_and_the_lock_are_what_the_models_generate() -> None:
    """If this fails, run ``make proto``."""
    files, lock = generate.generate(LOCK)
    assert {path.name: path.read_text() for path in generate.FOLDER.glob("*.proto")} == files
    assert generate.LOCK.read_text() == generate.lock_text(lock)


def test_the_schemas_keep_every_locked_field() -> None:
    assert protobuf.breaches(LOCK, DECLARED) == []


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.TYPE)
def test_every_event_has_a_message_and_a_topic_with_an_owner(event: type[Event]) -> None:
    assert event.__name__ == message_name(event.TYPE), "the dataschema attribute names the message by the event's type"
    assert event.__name__ in DECLARED
    assert event.TOPIC in OWNERS


@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.too_slow])
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


def test_no_message_has_a_type_that_json_carries_otherwise() -> None:
    allowed = {"string", "bool", "int32", "double", "google.protobuf.Timestamp", *DECLARED}
    for message, fields in DECLARED.items():
        for name, declaration in fields.items():
            if declaration != protobuf.RESERVED:
                kind = declaration.rpartition(" = ")[0].removeprefix("optional ").removeprefix("repeated ")
                assert kind in allowed, f"{message}.{name}"


def test_a_new_field_gets_the_next_number_and_a_removed_one_is_reserved_for_ever(tmp_path: Path) -> None:
    lock = generate.numbered([LampLit], {})
    assert lock == {"LampLit": {"room": "string = 1", "watts": "int32 = 2"}}
    without_watts = changed({"room": str})
    lock = generate.numbered([without_watts], lock)
    coloured = changed({"colour": (str | None, None), "room": str})
    lock = generate.numbered([coloured], lock)
    assert declared(schema_of(coloured, lock), tmp_path) == {
        "LampLit": {"room": "string = 1", "colour": "optional string = 3", "watts": "reserved", "2": "reserved"}
    }
    assert protobuf.breaches(lock, declared(schema_of(coloured, lock), tmp_path)) == []


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"room": str, "watts": float}, "LampLit.watts: the type is 'double', but was 'int32 = 2'"),
        ({"room": str | None, "watts": int}, "LampLit.room: the type is 'optional string', but was 'string = 1'"),
        ({"room": tuple[str, ...], "watts": int}, "LampLit.room: the type is 'repeated string', but was 'string = 1'"),
        ({"room": str, "watts": int, "colour": str}, "LampLit.colour: a new field needs a default"),
    ],
)
def test_an_incompatible_change_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(SchemaError, match=reason):
        generate.numbered([changed(fields)], generate.numbered([LampLit], {}))


def test_a_type_without_an_equal_in_json_is_refused() -> None:
    with pytest.raises(SchemaError, match="bytes"):
        generate.numbered([changed({"room": bytes})], {})


def test_removing_an_event_is_refused() -> None:
    with pytest.raises(SchemaError, match="LampLit"):
        generate.numbered([], generate.numbered([LampLit], {}))


@pytest.mark.parametrize(
    ("edit", "breach"),
    [
        (lambda text: text.replace("watts = 2", "watts = 7"), "LampLit.watts was 'int32 = 2' and is 'int32 = 7'"),
        (lambda text: text.replace("int32 watts", "double watts"), "LampLit.watts was 'int32 = 2' and is 'double = 2'"),
        (lambda text: text.replace("  int32 watts = 2;\n", ""), "LampLit.watts was 'int32 = 2' and is None"),
        (lambda text: text.replace("int32 watts = 2", "reserved 2"), "LampLit.watts was 'int32 = 2' and is None"),
        (lambda text: text.replace("LampLit", "LampLighted"), "LampLit.watts was 'int32 = 2' and is None"),
    ],
)
def test_a_schema_that_departs_from_the_lock_is_found(edit: Callable[[str], str], breach: str, tmp_path: Path) -> None:
    """Whether the generator wrote it or somebody edited it."""
    lock = generate.numbered([LampLit], {})
    text = schema_of(LampLit, lock)
    assert protobuf.breaches(lock, declared(text, tmp_path)) == []
    assert breach in protobuf.breaches(lock, declared(edit(text), tmp_path))


def test_docstrings_become_comments() -> None:
    lit = changed(
        {"room": str, "kind": (Literal["gas", "oil"] | None, None)},
        doc="A ``lamp`` was lit.\n\n    Args:\n        room, kind: where\n            it stands.\n    ",
    )
    text = generate.message(lit, generate.numbered([lit], {})["LampLit"])
    assert text.splitlines() == [
        "// A `lamp` was lit.",
        "message LampLit {",
        "  // Where it stands.",
        "  string room = 1;",
        "  // Where it stands. One of: gas, oil.",
        "  optional string kind = 2;",
        "}",
    ]


@pytest.mark.parametrize("doc", ["", "A lamp was lit.\n\nArgs:\n    lumen: how bright it is."])
def test_a_docstring_that_is_missing_or_describes_a_field_that_is_not_there_is_refused(doc: str) -> None:
    with pytest.raises(SchemaError, match="LampLit"):
        generate.documentation(changed({"room": str}, doc))
