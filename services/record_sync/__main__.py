"""``python -m services.record_sync``."""

from libs.service.running import run_service
from services.record_sync.app import SERVICE

if __name__ == "__main__":
    run_service(SERVICE)
