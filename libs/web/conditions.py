"""Conditional requests and content coding of answers (RFC 9110 sections 12.5.3 and 13)."""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

from aiohttp import web

from libs.core.decider import ExpectedVersion
from libs.core.errors import PreconditionFailed

COMPRESS_BYTES_MIN = 1024
COMPRESSED_TYPES = frozenset(
    {"application/json", "application/problem+json", "application/xml", "text/csv", "text/plain"}
)
TAGS_MAX = 100
GZIP_SUFFIX = "-gzip"
"""Suffix of the entity tags of compressed answers, which are separate representations (RFC 9110 section 8.8.3)."""

_KEPT_BY_304 = ("Cache-Control", "Content-Location", "Expires", "Vary")
_LISTED_TAG = re.compile(r'[ \t]*(?:((?:W/)?"[\x21\x23-\x7e\x80-\xff]*")[ \t]*)?(?:,|$)')
_VERSION = re.compile(rf'"(\d{{1,18}})(?:\.[0-9a-f]+)?(?:{GZIP_SUFFIX})?"', re.ASCII)
_WEIGHT = re.compile(r"[ \t]*q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)[ \t]*", re.IGNORECASE)


def finished(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Compress the answer if it is large enough; answer 304 if the caller already has it.

    Raises:
        PreconditionFailed: ``If-Match`` of a GET names another version.
    """
    if response.prepared or not isinstance(response, web.Response):
        return response
    body = response.body
    tag = response.headers.get("ETag")
    if isinstance(body, bytes) and len(body) >= COMPRESS_BYTES_MIN and response.content_type in COMPRESSED_TYPES:
        response.headers["Vary"] = "Accept-Encoding"
        if "Accept-Encoding" in request.headers and accepts_gzip(_joined(request, "Accept-Encoding")):
            response.enable_compression(web.ContentCoding.gzip)
            if tag is not None:
                tag = response.headers["ETag"] = f'{tag[:-1]}{GZIP_SUFFIX}"'
    if tag is None or request.method not in ("GET", "HEAD") or response.status != 200:
        return response
    return _conditional(request, response, tag)


def _conditional(request: web.Request, response: web.Response, tag: str) -> web.Response:
    """The tags of the plain and the compressed form both match: a client may hold either."""
    plain = tag.replace(f'{GZIP_SUFFIX}"', '"')
    forms = (tag, plain, f'{plain[:-1]}{GZIP_SUFFIX}"')
    if "If-Match" in request.headers:
        wanted = tags_of(_joined(request, "If-Match"))
        if wanted is not None and not set(wanted).intersection(forms):
            raise PreconditionFailed(f"the current version is {tag}")
    if "If-None-Match" in request.headers:
        known = tags_of(_joined(request, "If-None-Match"))
        opaque = [tag] if known is None else [item.removeprefix("W/") for item in known]
        kept_form = next((form for form in forms if form in opaque), None)
        if kept_form is not None:
            kept = {name: response.headers[name] for name in _KEPT_BY_304 if name in response.headers}
            return web.Response(status=304, headers={"ETag": kept_form, **kept})
    return response


def if_match_of(request: web.Request) -> ExpectedVersion:
    """The versions named by ``If-Match``, None if any will do.

    The comparison is strong (RFC 9110 section 13.1.1), so a weak tag matches nothing.

    Raises:
        PreconditionFailed: none of the tags can be one of ours.
    """
    if "If-Match" not in request.headers:
        return None
    tags = tags_of(_joined(request, "If-Match"))
    if tags is None:
        return None
    versions = frozenset(int(matched[1]) for tag in tags if (matched := _VERSION.fullmatch(tag)) is not None)
    if not versions:
        raise PreconditionFailed('If-Match must be the ETag of a version, such as "3"')
    return next(iter(versions)) if len(versions) == 1 else versions


def tags_of(listed: str) -> Sequence[str] | None:
    """The entity tags of a list, None for ``*``; empty if the text is no such list."""
    if listed.strip() == "*":
        return None
    return list(_tags(listed))


def _tags(listed: str) -> Iterator[str]:
    found: list[str] = []
    position = 0
    while position < len(listed):
        matched = _LISTED_TAG.match(listed, position)
        if matched is None or matched.end() == position or len(found) == TAGS_MAX:
            return
        if matched[1] is not None:
            found.append(matched[1])
        position = matched.end()
    yield from found


@lru_cache(maxsize=256)
def accepts_gzip(accept_encoding: str) -> bool:
    """Whether gzip is accepted and preferred no less than the plain form (RFC 9110 section 12.5.3)."""
    weights: dict[str, float] = {}
    for item in accept_encoding.lower().split(","):
        name, weight = _weighted(item)
        weights[name] = max(weight, weights.get(name, 0.0))
    gzip = max((weights[name] for name in ("gzip", "x-gzip") if name in weights), default=weights.get("*", 0.0))
    return gzip > 0 and gzip >= weights.get("identity", 0.0)


@lru_cache(maxsize=256)
def accepts_by_name(accept: str, media_type: str) -> bool:
    """Whether ``Accept`` names the media type; ranges such as ``*/*`` don't count (RFC 9110 section 12.5.1)."""
    weighted = (_weighted(item) for item in accept.lower().split(","))
    return any(name == media_type and weight > 0 for name, weight in weighted)


def _weighted(item: str) -> tuple[str, float]:
    name, *parameters = item.split(";")
    for parameter in parameters:
        if (matched := _WEIGHT.fullmatch(parameter)) is not None:
            return name.strip(), float(matched[1])
        if parameter.strip().startswith("q="):
            return name.strip(), 0.0
    return name.strip(), 1.0


def _joined(request: web.Request, name: str) -> str:
    """A list header, joined if it was sent on several lines (RFC 9110 section 5.3)."""
    return ", ".join(request.headers.getall(name))
