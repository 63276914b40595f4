"""``python -m services.gateway``"""

from libs.service.running import run_service
from services.gateway.app import SERVICE

if __name__ == "__main__":
    run_service(SERVICE)
