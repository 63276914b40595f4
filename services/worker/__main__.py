"""``python -m services.worker``."""

from libs.service.running import run_service
from services.worker.app import SERVICE

if __name__ == "__main__":
    run_service(SERVICE)
