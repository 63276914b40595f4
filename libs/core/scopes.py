"""The scopes that credentials of programs hold: ``<resource>:<right>``, or all of them."""

ALL_SCOPES = "*"
RESOURCES = (
    "data",
    "destinations",
    "ingest",
    "jobs",
    "keys",
    "projects",
    "sources",
    "sync",
    "usage",
    "users",
    "webhooks",
)
SCOPES = tuple(f"{resource}:{right}" for resource in RESOURCES for right in ("read", "write"))
READ_SCOPES = tuple(scope for scope in SCOPES if scope.endswith(":read"))
