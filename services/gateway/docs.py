"""The page at ``/docs``: Swagger UI from the installed package, so that it works without internet access."""

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

PAGE = b"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>DataSync API</title>
<link rel="icon" type="image/png" href="/docs/favicon-32x32.png" sizes="32x32">
<link rel="stylesheet" href="/docs/swagger-ui.css">
<link rel="stylesheet" href="/docs/index.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
START = b"""\
SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  docExpansion: "none",
  filter: true,
  tryItOutEnabled: true,
  validatorUrl: null,
  withCredentials: true,
});
"""
SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)

MEDIA_TYPES = MappingProxyType(
    {
        "swagger-ui.css": "text/css",
        "index.css": "text/css",
        "swagger-ui-bundle.js": "text/javascript",
        "start.js": "text/javascript",
        "favicon-32x32.png": "image/png",
    }
)
"""The page's files by name; it loads no others."""


@cache
def content_of(name: str) -> bytes:
    """A file of the page; the first call reads it, which blocks."""
    if name == "start.js":
        return START
    package = find_spec("swagger_ui")
    assert package is not None
    assert package.origin is not None
    return (Path(package.origin).parent / "static" / name).read_bytes()


@cache
def etag_of(name: str) -> str:
    return f'"{hashlib.sha256(content_of(name)).hexdigest()[:32]}"'
