"""Tables of jobs that are no more: taken over when asked, and those of living jobs never."""

import pytest

from libs.connectors.protocol import ConnectorRefused
from tests.integration.connectors.moving import Lake, Server, context_of, move, plan_of

FORMER, OTHER = 1, 2


@pytest.fixture(params=["postgres", "parquet"])
def target(request: pytest.FixtureRequest, destination: Server, lake: Lake) -> Server | Lake:
    return destination if request.param == "postgres" else lake


async def rows_of(target: Server | Lake) -> list[int]:
    if isinstance(target, Server):
        return [int(row.strip("()")) for row in await target.rows("t")]
    return [row["id"] for row in target.rows("public/t")]


@pytest.fixture
async def written(source: Server, target: Server | Lake) -> Server | Lake:
    """A table that the former job wrote; what the source holds now is another row."""
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    await move(source, target, plan_of("t"), context_of(job_id=FORMER))
    await source.execute("UPDATE t SET id = 2")
    return target


async def test_a_deleted_jobs_table_is_taken_over_and_then_the_new_jobs(source: Server, written: Server | Lake) -> None:
    taking = context_of("run-2", 2, job_id=OTHER, living_jobs=frozenset({OTHER}))
    await move(source, written, plan_of("t"), taking)
    assert await rows_of(written) == [2]
    await move(source, written, plan_of("t"), context_of("run-3", 3, job_id=OTHER))
    with pytest.raises(ConnectorRefused, match=f"is written by job {OTHER}"):
        await move(source, written, plan_of("t"), context_of("run-4", 4, job_id=FORMER))


async def test_a_deleted_jobs_table_is_cleared_for_the_job_that_takes_over(
    source: Server, written: Server | Lake
) -> None:
    taking = context_of("run-2", 2, job_id=OTHER, living_jobs=frozenset({OTHER}))
    async with written.destination().open(taking) as run:
        await run.clear(plan_of("t"))
    if isinstance(written, Server):
        assert await written.tables() == []
    else:
        assert written.files("public/t") == []


@pytest.mark.parametrize(
    ("project_id", "living_jobs"), [(1, None), (1, frozenset({FORMER, OTHER})), (2, frozenset({OTHER}))]
)
async def test_a_table_of_a_living_job_or_of_another_project_is_not_taken_over(
    source: Server, written: Server | Lake, project_id: int, living_jobs: frozenset[int] | None
) -> None:
    asking = context_of("run-2", 2, job_id=OTHER, project_id=project_id, living_jobs=living_jobs)
    with pytest.raises(ConnectorRefused, match=f"is written by job {FORMER}") as refusal:
        await move(source, written, plan_of("t"), asking)
    assert '"take_over": true' in refusal.value.message
    assert await rows_of(written) == [1]
