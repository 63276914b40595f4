"""The configuration of a Parquet destination."""

import posixpath
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from libs.connectors.form import ConnectorConfig, form_field

_OBJECT_STORE_FIELDS = (
    "s3_bucket",
    "s3_region",
    "s3_path",
    "s3_endpoint",
    "s3_access_key",
    "s3_secret_key",
    "s3_use_ssl",
    "s3_path_style",
)


class ParquetWriterConfig(BaseModel):
    """Where the files go."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    local_path: str = form_field(
        "Local path",
        "Absolute path of a directory on the worker's machine",
        1,
        min_length=1,
        max_length=1024,
    )

    @model_validator(mode="before")
    @classmethod
    def _only_local(cls, value: Any) -> Any:
        """Accept the empty object store fields that OLake's form sends with a local path."""
        if not isinstance(value, dict):
            return value
        for name in _OBJECT_STORE_FIELDS:
            if value.get(name) not in (None, "", False):
                raise ValueError(f"{name} is not supported: only local_path is")
        return {key: item for key, item in value.items() if key not in _OBJECT_STORE_FIELDS}

    @field_validator("local_path")
    @classmethod
    def _absolute(cls, path: str) -> str:
        if not path.startswith("/") or "\x00" in path:
            raise ValueError("must be an absolute path, such as /data/lake")
        if ".." in path.split("/"):
            raise ValueError("must not contain ..")
        return posixpath.normpath(path)


class ParquetConfig(ConnectorConfig):
    """Parquet files, compressed with zstd, in a directory that the workers share."""

    WRAPPER: ClassVar[str | None] = "writer"

    type: Literal["PARQUET"] = form_field("Type", "The kind of files", 1, default="PARQUET")
    writer: ParquetWriterConfig = form_field("Writer", "Where the files go", 2)

    @model_validator(mode="before")
    @classmethod
    def _nest(cls, value: Any) -> Any:
        if isinstance(value, dict) and "writer" not in value:
            return {
                "type": value.get("type") or "PARQUET",
                "writer": {key: item for key, item in value.items() if key != "type"},
            }
        return value

    @field_validator("type", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    def address(self) -> str:
        return self.writer.local_path
