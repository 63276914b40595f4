"""Files as answers."""

from aiohttp import web


def attachment(request: web.Request, name: str, content: bytes) -> web.Response:
    """A file of which a single range may be asked for (RFC 9110 section 14)."""
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "Accept-Ranges": "bytes"}
    try:
        asked = request.http_range
    except ValueError:
        asked = slice(None)
    if asked.start is None and asked.stop is None:
        return web.Response(body=content, content_type="application/gzip", headers=headers)
    start, stop, _ = asked.indices(len(content))
    if start >= stop:
        headers["Content-Range"] = f"bytes */{len(content)}"
        return web.Response(status=416, headers=headers)
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
    return web.Response(status=206, body=content[start:stop], content_type="application/gzip", headers=headers)
