"""Which requests are admitted: credentials and rate limits together."""

from aiohttp import web

from libs.core.addresses import one_client
from libs.core.errors import Unauthenticated
from libs.core.principal import Principal
from libs.web.shell import RESPONSE_HEADERS
from services.gateway.addresses import ClientAddresses
from services.gateway.credentials import Caller, Credentials
from services.gateway.rate_limits.limiter import RateLimiter
from services.gateway.rate_limits.permits import Policy, Verdict
from services.gateway.rate_limits.policies import Policies, headers_of, refusal_of


class Admission:
    """Admits requests or rejects them, and adds the headers of the rate limit that applied to the response."""

    def __init__(
        self, credentials: Credentials, limiter: RateLimiter, policies: Policies, addresses: ClientAddresses
    ) -> None:
        self._credentials = credentials
        self._limiter = limiter
        self._policies = policies
        self._addresses = addresses

    def address_of(self, request: web.Request) -> str:
        """Where the request comes from."""
        return self._addresses.of(request.remote, request.headers.getall("X-Forwarded-For", ()))

    async def caller_of(self, request: web.Request) -> Caller:
        """Who sent the request; an invalid credential counts against the address that sent it.

        Raises:
            Unauthenticated: no credential, or one that auth rejects.
            RateLimited: too many of those came from this address; then only credentials known to be valid are checked.
            RetryLater: auth can't be reached.
        """
        address = self._policies.address
        if address is not None and not self._credentials.has_been_valid(request):
            verdict = self._limiter.known_refusal(address, one_client(self.address_of(request)))
            if verdict is not None:
                _answer(request, address, verdict)
        try:
            return await self._credentials.caller_of(request)
        except Unauthenticated:
            await self.require_address(request)
            raise

    async def require_address(self, request: web.Request) -> None:
        """Count an unauthenticated request against its address; raises ``RateLimited``."""
        policy = self._policies.address
        if policy is not None:
            _answer(request, policy, await self._limiter.admit(policy, one_client(self.address_of(request))))

    async def require_caller(self, request: web.Request, path: str, principal: Principal) -> None:
        """Count a request against its caller; raises ``RateLimited``."""
        policy = self._policies.of(path, principal)
        if policy is not None:
            subject = f"{principal.kind}/{principal.subject}"
            _answer(request, policy, await self._limiter.admit(policy, subject))


def _answer(request: web.Request, policy: Policy, verdict: Verdict) -> None:
    request[RESPONSE_HEADERS].update(headers_of(policy, verdict))
    if not verdict.admitted:
        raise refusal_of(policy, verdict)
