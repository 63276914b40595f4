"""``python -m services.catalog``."""

from libs.service.running import run_service
from services.catalog.app import SERVICE

if __name__ == "__main__":
    run_service(SERVICE)
