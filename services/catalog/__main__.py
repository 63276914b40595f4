"""``python -m services.catalog``."""

from libs.runtime.service import run_service
from services.catalog.app import SERVICE

if __name__ == "__main__":
    run_service(SERVICE)
