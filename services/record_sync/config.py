"""The settings of the record sync service."""

from libs.contracts.services import service_named
from libs.process.settings import Port, ServiceSettings


class RecordSyncSettings(ServiceSettings):
    """What an installation may choose about developer sync records: nothing but what every service has."""

    port: Port = service_named("record_sync").port
