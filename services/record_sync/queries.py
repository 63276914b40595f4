"""Reads of records: pages of lists, and histories."""

from itertools import product

from libs.eventsourcing.documents import Documents
from libs.eventsourcing.listings import Lists, Page, list_index
from services.record_sync.domain.record import RECORD, list_name

_FILTERS = ("state.developer_id", "state.resource_type", "state.status")

INDEXES = {
    RECORD.collection: [
        list_index(["project_id", *(field for field, is_set in zip(_FILTERS, choice, strict=True) if is_set)])
        for choice in product((False, True), repeat=len(_FILTERS))
    ]
}


class RecordQueries:
    """What the service asks its own database."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self._lists = Lists(documents, RECORD)

    async def page(
        self,
        project_id: int,
        developer_id: str | None,
        resource_type: str | None,
        status: str | None,
        *,
        offset: int,
        limit: int,
    ) -> Page:
        """Some records of a list and how many it has, both of the same moment.

        Newest first is the order of the commits: as one instance writes, that is falling ``created_at``, then ``id``;
        the clocks of several instances may differ by what they are apart.
        """
        values = zip(_FILTERS, (developer_id, resource_type, status), strict=True)
        criteria = {"project_id": project_id} | {field: value for field, value in values if value is not None}
        name = list_name(project_id, developer_id, resource_type, status)
        return await self._lists.page(name, criteria, offset=offset, limit=limit)
