"""The event schemas under ``proto/``, as protoc understands them."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[2] / "proto"
PACKAGE = "datasync.v1"
RESERVED = "reserved"

_Field: Any = descriptor_pb2.FieldDescriptorProto

Declarations = dict[str, dict[str, str]]
"""Message -> field -> declaration, such as ``optional string = 5``; ``reserved`` for a reserved name or number."""


def compile_schemas(root: Path = ROOT) -> descriptor_pb2.FileDescriptorSet:
    """All schemas below ``root`` with what they import; raises ``ValueError`` when they don't compile."""
    sources = sorted(str(path.relative_to(root)) for path in root.rglob("*.proto"))
    included = Path(protoc.__file__).parent / "_proto"
    with tempfile.NamedTemporaryFile() as out:
        arguments = [f"-I{root}", f"-I{included}", f"--descriptor_set_out={out.name}", "--include_imports", *sources]
        if protoc.main(["protoc", *arguments]) != 0:
            raise ValueError("the schemas do not compile")
        return descriptor_pb2.FileDescriptorSet.FromString(Path(out.name).read_bytes())


def message_classes(schemas: descriptor_pb2.FileDescriptorSet) -> Mapping[str, type[Message]]:
    """The messages of our package by name."""
    pool = descriptor_pool.DescriptorPool()
    for file in schemas.file:
        pool.Add(file)
    names = [message.name for file in schemas.file if file.package == PACKAGE for message in file.message_type]
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in names}


def declarations(schemas: descriptor_pb2.FileDescriptorSet) -> Declarations:
    """What each message of our package declares."""
    declared: Declarations = {}
    for message in (message for file in schemas.file if file.package == PACKAGE for message in file.message_type):
        fields = {field.name: _declaration(field) for field in message.field}
        reserved = [str(number) for span in message.reserved_range for number in range(span.start, span.end)]
        declared[message.name] = fields | dict.fromkeys([*reserved, *message.reserved_name], RESERVED)
    return declared


def breaches(lock: Declarations, declared: Declarations) -> list[str]:
    """Where a schema departs from the lock: a locked field is neither as it was nor reserved; empty for nowhere."""
    return [
        f"{message}.{name} was {locked!r} and is {declared.get(message, {}).get(name)!r}"
        for message, fields in lock.items()
        for name, locked in fields.items()
        if not _is_kept(name, locked, declared.get(message, {}))
    ]


def _is_kept(name: str, locked: str, declared: Mapping[str, str]) -> bool:
    number = locked.rpartition(" = ")[2]
    return declared.get(name) == locked or declared.get(name) == declared.get(number) == RESERVED


def _declaration(field: Any) -> str:
    kind = field.type_name.removeprefix(f".{PACKAGE}.").lstrip(".") or _Field.Type.Name(field.type)[5:].lower()
    label = "repeated " if field.label == _Field.LABEL_REPEATED else "optional " if field.proto3_optional else ""
    return f"{label}{kind} = {field.number}"
