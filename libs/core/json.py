"""Strict JSON: what can't be stored and published without loss is refused by its path before anything is stored.

The rules: at most 64 levels deep, no duplicate keys, no NUL characters, finite numbers, integers within ±(2^63-1).
RFC 8259 leaves duplicate keys open; MongoDB, PostgreSQL and protobuf disagree on the rest.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import orjson

from libs.core.errors import FieldError, InvalidInput

DEPTH_MAX = 64
INTEGER_MAX = 2**63 - 1

JsonObject = dict[str, Any]

_COMMA = ord(",")
_SPACE = b" \t\r\n"
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_STRUCTURE = re.compile(_STRING.pattern + rb'|[\[{]+|[\]}]+|,|"', re.DOTALL)


class _DuplicateKey(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def parse_json(body: bytes, *, subject: str = "request body", wrapped: int = 0) -> Any:
    """Parse UTF-8 JSON under the rules above.

    Args:
        subject: what error messages call the text.
        wrapped: the number of outer levels that the caller did not send; they don't count as depth.

    Raises:
        InvalidInput: it is not JSON or breaks a rule; ``errors`` names the path.
    """
    with _translated(subject):
        # orjson first: it rejects deep nesting without recursion, which the parser below would not survive.
        orjson.loads(body)
        value = json.loads(body, object_pairs_hook=_unique_pairs, parse_constant=_refuse_constant)
    check_json(value, depth=-wrapped)
    return value


def raw_members(text: bytes, *, subject: str = "request body") -> dict[str, bytes]:
    """The members of an object as unparsed text; the rules are not checked for their values.

    Raises:
        InvalidInput: it is not an object, or has a key twice.
    """
    with _translated(subject):
        pairs = []
        for part in _parts(text, b"{", b"}", subject):
            key = _STRING.match(part)
            colon = -1 if key is None else part.find(b":", key.end())
            if key is None or colon < 0 or part[key.end() : colon].strip(_SPACE):
                raise ValueError("a member of an object is a string, a colon and a value")
            pairs.append((json.loads(key[0]), part[colon + 1 :].strip(_SPACE)))
        return _unique_pairs(pairs)


def raw_items(text: bytes, *, subject: str = "request body") -> list[bytes] | None:
    """The items of an array as unparsed text, like ``raw_members``; None if it is not an array."""
    if text[:1] != b"[":
        return None
    try:
        return [bytes(item) for item in msgspec.json.decode(text, type=list[msgspec.Raw])]
    except (RecursionError, ValueError):
        # It also rejects surrogates and deep nesting, which must be an error of that item alone.
        with _translated(subject):
            return list(_parts(text, b"[", b"]", subject))


def is_json(text: bytes) -> bool:
    """Whether a text is JSON by its grammar, even if it breaks a rule or is nested too deep."""
    try:
        json.loads(text, parse_int=_ignored, parse_float=_ignored, parse_constant=_refuse_constant)
    except RecursionError:
        return True
    except ValueError:
        return False
    return True


def _parts(text: bytes, opening: bytes, closing: bytes, subject: str) -> Iterator[bytes]:
    """The texts between the outermost commas, in time linear in the length, however deep the nesting."""
    text = text.strip(_SPACE)
    if not text.startswith(opening):
        raise _invalid("", f"must be a JSON {'object' if opening == b'{' else 'array'}", "invalid")
    depth, start = 0, 1
    for token in _STRUCTURE.finditer(text):
        first, length = text[token.start()], token.end() - token.start()
        if first == _COMMA:
            if depth == 1:
                yield _part(text[start : token.start()])
                start = token.end()
        elif first in b"[{":
            depth += length
        elif first in b"]}":
            depth -= length
            if depth <= 0:
                break
        elif length == 1:
            raise ValueError("a string does not end")
    if depth != 0 or token.end() != len(text) or not text.endswith(closing):
        raise ValueError(f"{subject} ends too early or too late")
    last = text[start:-1].strip(_SPACE)
    if last or start > 1:
        yield _part(last)


def _part(text: bytes) -> bytes:
    stripped = text.strip(_SPACE)
    if not stripped:
        raise ValueError("a value is missing before or after a comma")
    return stripped


def _ignored(_: str) -> int:
    return 0


@contextmanager
def _translated(subject: str) -> Iterator[None]:
    """Turn a parser's errors into ``InvalidInput``."""
    try:
        yield
    except _DuplicateKey as error:
        raise _invalid(error.key, f"the key {error.key!r} occurs twice in one object", "duplicate_key") from None
    except RecursionError:
        raise _invalid("", f"{subject} is nested deeper than {DEPTH_MAX} levels", "too_deep") from None
    except ValueError as error:
        if "ecursion" in str(error) or "depth limit" in str(error):
            raise _invalid("", f"{subject} is nested deeper than {DEPTH_MAX} levels", "too_deep") from None
        raise InvalidInput(f"{subject} is not valid JSON: {error}", code="malformed_json") from None


def check_json(value: Any, path: str = "", depth: int = 0) -> None:
    """Check a parsed value against the rules; raises ``InvalidInput`` naming the path."""
    match value:
        case bool() | None:
            return
        case str():
            if "\x00" in value:
                raise _invalid(path, "contains a NUL character", "nul_character")
        case int():
            if abs(value) > INTEGER_MAX:
                raise _invalid(path, "is an integer outside ±(2^63-1)", "integer_out_of_range")
        case float():
            if not math.isfinite(value):
                raise _invalid(path, "is not a finite number", "not_finite")
        case dict():
            if depth >= DEPTH_MAX:
                raise _invalid(path, f"is nested deeper than {DEPTH_MAX} levels", "too_deep")
            for key, item in value.items():
                if "\x00" in key:
                    raise _invalid(path, "has a key with a NUL character", "nul_character")
                check_json(item, f"{path}.{key}" if path else key, depth + 1)
        case list():
            if depth >= DEPTH_MAX:
                raise _invalid(path, f"is nested deeper than {DEPTH_MAX} levels", "too_deep")
            for index, item in enumerate(value):
                check_json(item, f"{path}[{index}]", depth + 1)


def dump_json(value: Any) -> str:
    """Compact JSON text, as events and documents store free-form values."""
    return orjson.dumps(value).decode()


def canonical_json(value: Any) -> bytes:
    """Compact JSON with sorted keys: equal values give equal bytes, for hashes and comparisons."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_UTC_Z)


def _unique_pairs(pairs: list[tuple[str, Any]]) -> JsonObject:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKey(key)
            seen.add(key)
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _invalid(path: str, message: str, code: str) -> InvalidInput:
    where = path[:200] or "the body"
    return InvalidInput(f"{where}: {message}", code=code, errors=[FieldError(path[:200], message, code)])
