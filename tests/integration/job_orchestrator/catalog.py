"""The real catalog beside an orchestrator."""

import base64
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pydantic import SecretStr

from libs.service.running import running_service
from services.catalog.app import SERVICE as CATALOG
from services.catalog.config import CatalogSettings
from tests.integration.job_orchestrator.orchestrator import KEYS, trusted_keys


@asynccontextmanager
async def running_catalog(mongod: str, prefix: str) -> AsyncIterator[tuple[str, CatalogSettings]]:
    """The catalog on the same databases."""
    settings = CatalogSettings(
        mongodb_url=mongod,
        database_prefix=prefix,
        port=0,
        signing_key=SecretStr(KEYS["catalog"][0]),
        trusted_keys=trusted_keys(),
        encryption_keys={"k1": SecretStr(base64.b64encode(os.urandom(32)).decode())},
    )
    async with running_service(CATALOG, settings) as service:
        yield service.base_url, settings.model_copy(update={"catalog_url": service.base_url})
