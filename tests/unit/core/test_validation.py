"""What a caller reads of a wrong field."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from libs.core.validation import MOMENT, field_errors


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    port: int = Field(default=1, ge=1)


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)
    inner: Inner = Inner()
    items: list[int] = Field(default_factory=list, max_length=2)
    after: Annotated[int, Field(ge=0)] | Literal["latest"] = 0
    at: AwareDatetime | None = None


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({}, "name", "is required"),
        ({"name": ""}, "name", "must have at least 1 character"),
        ({"name": 7}, "name", "must be a valid string"),
        ({"name": "a", "verfy": True}, "verfy", "is not a known field"),
        ({"name": "a", "my-key": True}, "my-key", "is not a known field"),
        ({"name": "a", "inner": []}, "inner", "must be a JSON object"),
        ({"name": "a", "inner": {"port": 0}}, "inner.port", "must be greater than or equal to 1"),
        ({"name": "a", "items": [1, "b"]}, "items[1]", "must be a valid integer, unable to parse string as an integer"),
        ({"name": "a", "items": [1, 2, 3]}, "items", "must have at most 2 items, not 3"),
        ({"name": "a", "after": -1}, "after", "must be greater than or equal to 0, or must be 'latest'"),
        ({"name": "a", "at": "2026-02-21T10:30:00 02:00"}, "at", MOMENT),
        ({"name": "a", "at": "2026-02-21T10:30:00"}, "at", MOMENT),
        ([], "", "must be a JSON object"),
    ],
)
def test_a_finding_names_the_field_and_what_it_must_be(body: Any, field: str, message: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Body.model_validate(body)
    [found] = field_errors(refused.value)
    assert (found.field, found.message) == (field, message)


def test_paths_begin_with_what_the_value_is_called() -> None:
    with pytest.raises(ValidationError) as refused:
        Body.model_validate({"inner": {"port": 0}})
    assert [item.field for item in field_errors(refused.value, "config")] == ["config.name", "config.inner.port"]
