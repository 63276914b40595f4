"""``python -m services.record_sync``."""

from libs.runtime.service import run_service
from services.record_sync.app import SERVICE

if __name__ == "__main__":
    run_service(SERVICE)
