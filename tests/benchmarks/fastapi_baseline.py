"""The baseline of ``records``: developer sync records as FastAPI and motor do them, without events, keys or a gateway.

Run in an environment that holds FastAPI: ``python fastapi_baseline.py <mongodb url> <database> <port>``. What it must
not lack is durability (majority, journalled), the unique key, and the indexes that its queries use.
"""

import sys
import uuid
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Query
from motor.motor_asyncio import AsyncIOMotorClient
from pydantic import BaseModel, Field
from pymongo.errors import DuplicateKeyError


class NewRecord(BaseModel):
    developerId: str = Field(min_length=1, max_length=128)  # noqa: N815
    resourceType: str = Field(min_length=1, max_length=128)  # noqa: N815
    resourceKey: str = Field(min_length=1, max_length=512)  # noqa: N815
    data: dict[str, Any]
    status: str = Field(default="ACTIVE", pattern=r"^[A-Z][A-Z0-9_]{0,63}$")
    metadata: dict[str, Any] = Field(default_factory=dict)


def create_app(url: str, database: str) -> FastAPI:
    client: Any = AsyncIOMotorClient(url, w="majority", journal=True, tz_aware=True)
    records = client[database]["records"]

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> Any:
        await records.create_index([("developerId", 1), ("resourceType", 1), ("resourceKey", 1)], unique=True)
        await records.create_index([("developerId", 1), ("createdAt", -1), ("_id", -1)])
        await records.create_index([("createdAt", -1), ("_id", -1)])
        yield

    app = FastAPI(lifespan=lifespan)

    async def create(body: NewRecord) -> dict[str, Any]:
        now = datetime.now(UTC)
        document = {
            "_id": str(uuid.uuid4()),
            **body.model_dump(),
            "lastSyncedAt": now,
            "createdAt": now,
            "updatedAt": now,
        }
        try:
            await records.insert_one(document)
        except DuplicateKeyError:
            raise HTTPException(409, "the record exists already") from None
        return shown(document)

    async def fetch(record_id: str) -> dict[str, Any]:
        document = await records.find_one({"_id": record_id})
        if document is None:
            raise HTTPException(404, "no such record")
        return shown(document)

    async def listed(
        developerId: str | None = None,  # noqa: N803
        limit: int = Query(default=50, ge=1, le=100),
        page: int = Query(default=1, ge=1),
    ) -> dict[str, Any]:
        criteria = {} if developerId is None else {"developerId": developerId}
        total = await records.count_documents(criteria)
        found = records.find(criteria).sort([("createdAt", -1), ("_id", -1)]).skip((page - 1) * limit).limit(limit)
        data = [shown(document) async for document in found]
        return {"total": total, "page": page, "limit": limit, "data": data}

    app.add_api_route("/api/v1/sync/records", create, methods=["POST"], status_code=201)
    app.add_api_route("/api/v1/sync/records", listed, methods=["GET"])
    app.add_api_route("/api/v1/sync/records/{record_id}", fetch, methods=["GET"])
    return app


def shown(document: dict[str, Any]) -> dict[str, Any]:
    return {"id": document["_id"], **{name: value for name, value in document.items() if name != "_id"}}


if __name__ == "__main__":
    uvicorn.run(
        create_app(sys.argv[1], sys.argv[2]),
        host="127.0.0.1",
        port=int(sys.argv[3]),
        log_level="warning",
        access_log=False,
    )
