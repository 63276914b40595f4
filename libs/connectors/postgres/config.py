"""What a person types to connect a PostgreSQL."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from libs.connectors.form import ConnectorConfig, NamesAndValues, form_field, one_choice

SslMode = Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]
SshConfig = Annotated[
    dict[str, Any] | None, one_choice("no_tunnel", "No tunnel", "SSH tunnel", "The server is connected to directly")
]
CONNECTION_PARAMETERS = {
    "ApplicationName": "application_name",
    "application_name": "application_name",
    "statement_timeout": "statement_timeout",
    "lock_timeout": "lock_timeout",
    "search_path": "search_path",
}


class SslConfig(BaseModel):
    """TLS as libpq understands it (PostgreSQL documentation, section 34.19)."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    mode: SslMode = form_field("Mode", "How the connection is encrypted and the server verified", 1, default="prefer")
    server_ca: str = form_field(
        "CA certificate",
        "PEM text; the system's certificates are trusted when empty",
        2,
        default="",
        several_lines=True,
    )
    client_cert: str = form_field(
        "Client certificate", "PEM text of the certificate that the server asks for", 3, default="", several_lines=True
    )
    client_key: str = form_field(
        "Client key",
        "PEM text of the certificate's private key, without a passphrase",
        4,
        default="",
        secret=True,
        several_lines=True,
    )

    @model_validator(mode="after")
    def _complete(self) -> "SslConfig":
        if bool(self.client_cert) != bool(self.client_key):
            raise ValueError("client_cert and client_key come together")
        return self


class PostgresConfig(ConnectorConfig):
    """A PostgreSQL server, 12 or newer, and how to reach it."""

    host: str = form_field("Host", "Name or IP address of the server", 1, min_length=1, max_length=253)
    port: int = form_field("Port", "TCP port", 2, default=5432, ge=1, le=65535)
    database: str = form_field("Database", "Name of the database", 3, min_length=1, max_length=63)
    username: str = form_field("Username", "Role to log in as", 4, min_length=1, max_length=63)
    password: str = form_field("Password", "The role's password", 5, default="", secret=True)
    ssl: SslConfig = form_field("SSL", "Encryption of the connection", 6, default=SslConfig())
    jdbc_url_params: NamesAndValues = form_field(
        "Connection parameters",
        "Server settings of the session: application_name (of a source alone), statement_timeout, lock_timeout, "
        "search_path (empty unless set here; functions of views or triggers may need it)",
        7,
        default={},
    )
    max_threads: int = form_field("Threads", "Connections that a sync opens at most", 8, default=2, ge=1, le=32)
    retry_count: int = form_field("Retries", "How often a refused connection is tried again", 9, default=3, ge=0, le=20)

    @field_validator("host")
    @classmethod
    def _network_host(cls, host: str) -> str:
        host = host.strip()
        if not host or "/" in host or "," in host or any(character.isspace() for character in host):
            raise ValueError("is one host name or IP address")
        return host

    @field_validator("ssl", "jdbc_url_params", mode="before")
    @classmethod
    def _absent_is_default(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("jdbc_url_params")
    @classmethod
    def _known_parameters(cls, parameters: dict[str, str]) -> dict[str, str]:
        unknown = sorted(set(parameters) - set(CONNECTION_PARAMETERS))
        if unknown:
            raise ValueError(f"{unknown[0]} is not supported; supported are {', '.join(CONNECTION_PARAMETERS)}")
        return parameters

    @property
    def application_name_given(self) -> bool:
        return any(CONNECTION_PARAMETERS[name] == "application_name" for name in self.jdbc_url_params)

    def address(self) -> str:
        return f"{self.host.lower()}:{self.port}"

    def session_settings(self) -> dict[str, str]:
        """The server's settings that this configuration decides."""
        return {}


class PostgresSourceConfig(PostgresConfig):
    """A PostgreSQL to read from."""

    schemas: list[str] = form_field(
        "Schemas", "Schemas to look for tables in; all but the system's when empty", 10, default=[]
    )
    row_security: Literal["refuse", "filtered"] = form_field(
        "Row-level security",
        "refuse: a table whose policies would hide rows from the role is not read; filtered: the visible rows are",
        13,
        default="refuse",
    )
    update_method: Annotated[
        dict[str, Any] | None,
        one_choice(
            "Standalone",
            "Standalone",
            "Update method",
            "Rows are read with queries; reading logical changes (CDC) will follow",
        ),
    ] = form_field(
        "Update method",
        "How changes are found in incremental runs",
        11,
        default=None,
    )
    ssh_config: SshConfig = form_field("SSH tunnel", "Not supported so far", 12, default=None)

    def session_settings(self) -> dict[str, str]:
        return {"row_security": "on" if self.row_security == "filtered" else "off"}

    @field_validator("schemas", mode="before")
    @classmethod
    def _no_schemas(cls, value: Any) -> Any:
        return [] if value is None else value

    @field_validator("update_method", mode="before")
    @classmethod
    def _standalone(cls, value: Any) -> Any:
        return _refuse_cdc(value)

    @field_validator("ssh_config", mode="before")
    @classmethod
    def _no_tunnel(cls, value: Any) -> Any:
        return refuse_content(value, "connecting through an SSH tunnel is not supported")


class PostgresDestinationConfig(PostgresConfig):
    """A PostgreSQL to write to."""

    max_threads: int = form_field(
        "Threads", "Connections that copy at once; one more prepares and commits", 8, default=2, ge=1, le=32
    )
    default_schema: str = form_field(
        "Schema", "Schema for every table; the source's schema names are kept when empty", 10, default="", max_length=63
    )
    ssh_config: SshConfig = form_field("SSH tunnel", "Not supported so far", 12, default=None)

    @field_validator("ssh_config", mode="before")
    @classmethod
    def _no_tunnel(cls, value: Any) -> Any:
        return refuse_content(value, "connecting through an SSH tunnel is not supported")


def refuse_content(value: Any, message: str) -> None:
    """None for what a form sends for an empty field; anything else is refused."""
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if item not in (None, "", 0, 22) and key != "type"}
    if value:
        raise ValueError(message)


def _refuse_cdc(value: Any) -> Any:
    if value in (None, "", {}):
        return None
    kind = value.get("type") if isinstance(value, dict) else value
    if str(kind).lower() != "standalone":
        raise ValueError("reading logical changes (CDC) is not supported; choose Standalone")
    return {"type": "Standalone"}
