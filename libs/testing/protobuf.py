"""The event schemas under ``proto/``: compiled, described, and compared with what was last released.

``python -m libs.testing.protobuf`` writes the present schemas down as released; do that with every release.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[2] / "proto"
RELEASED = ROOT / "datasync" / "v1" / "released.json"
PACKAGE = "datasync.v1"

_Field: Any = descriptor_pb2.FieldDescriptorProto

Released = dict[str, dict[str, dict[str, Any]]]


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


def describe(schemas: descriptor_pb2.FileDescriptorSet) -> Released:
    """Each message's fields: number, type and whether repeated or optional; reserved numbers under ``reserved``."""
    described: Released = {}
    for file in schemas.file:
        if file.package != PACKAGE:
            continue
        for message in file.message_type:
            fields: dict[str, dict[str, Any]] = {field.name: _described(field) for field in message.field}
            reserved = [number for span in message.reserved_range for number in range(span.start, span.end)]
            if reserved or message.reserved_name:
                fields["reserved"] = {"numbers": reserved, "names": sorted(message.reserved_name)}
            described[message.name] = fields
    return described


def incompatibilities(released: Released, present: Released) -> list[str]:
    """Why a reader of the released schemas could misread the present messages; empty when none could.

    The rules of https://protobuf.dev/programming-guides/proto3/#updating for the binary and the JSON form.
    """
    found = []
    for name, fields in released.items():
        if name not in present:
            found.append(f"{name} is gone")
            continue
        now = present[name]
        reserved = now.get("reserved", {"numbers": [], "names": []})
        for field, before in fields.items():
            if field == "reserved":
                lost = set(before["numbers"]) - set(reserved["numbers"])
                found += [f"{name}: the number {number} is no longer reserved" for number in sorted(lost)]
            elif field not in now:
                if before["number"] not in reserved["numbers"] or field not in reserved["names"]:
                    found.append(f"{name}.{field} is gone, and its number and name are not reserved")
            elif now[field] != before:
                found.append(f"{name}.{field} was {_text(before)} and is {_text(now[field])}")
    return found


def _described(field: Any) -> dict[str, Any]:
    kind = field.type_name.lstrip(".") or _Field.Type.Name(field.type).removeprefix("TYPE_").lower()
    label = "repeated" if field.label == _Field.LABEL_REPEATED else "optional" if field.proto3_optional else ""
    return {"number": field.number, "type": kind, "label": label}


def _text(field: Mapping[str, Any]) -> str:
    return f"{field['label']} {field['type']} = {field['number']}".strip()


def main() -> int:
    """Write the present schemas down as released, unless they break with what was."""
    present = describe(compile_schemas())
    broken = incompatibilities(json.loads(RELEASED.read_text()), present) if RELEASED.exists() else []
    for reason in broken:
        sys.stderr.write(f"{reason}\n")
    if broken:
        return 1
    RELEASED.write_text(json.dumps(present, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
