"""The image's HEALTHCHECK: whether what listens on PORT answers that it is alive."""

import http.client
import os
import sys

TIMEOUT_SECONDS = 4

connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("PORT", "8080")), timeout=TIMEOUT_SECONDS)
try:
    connection.request("GET", "/healthz")
    status = connection.getresponse().status
except OSError as error:
    sys.exit(f"{type(error).__name__}: {error}")
sys.exit(0 if status == 200 else f"/healthz answers {status}")
