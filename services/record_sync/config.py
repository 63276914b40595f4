"""The settings of the record sync service."""

from libs.contracts.services import service_named
from libs.process.setting_types import Port
from libs.process.settings import ServiceSettings


class RecordSyncSettings(ServiceSettings):
    """The settings of developer sync records; it has none of its own."""

    port: Port = service_named("record_sync").port
