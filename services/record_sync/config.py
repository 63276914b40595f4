"""The settings of the record sync service."""

from libs.process.settings import ServiceSettings


class RecordSyncSettings(ServiceSettings):
    """What an installation may choose about developer sync records: nothing but what every service has."""

    port: int = 8084
