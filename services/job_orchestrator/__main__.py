"""``python -m services.job_orchestrator``"""

from libs.service.running import run_service
from services.job_orchestrator.app import SERVICE

if __name__ == "__main__":
    run_service(SERVICE)
