"""``python -m services.auth``."""

from libs.service.running import run_service
from services.auth.app import SERVICE

if __name__ == "__main__":
    run_service(SERVICE)
