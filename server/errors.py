"""Every error that may reach a user, with the HTTP status it becomes.

The layers below `api/` raise these; `api/` turns them into the error envelope. None of them carries a traceback
or a path of this machine.
"""

from __future__ import annotations

from collections.abc import Mapping


class OnebaseError(Exception):
    """A fault with a reason for the user: `message`, `code`, the `param` at fault, and an HTTP `status`.

    `headers` are sent with the answer, `Retry-After` (`retry_after`, whole seconds) aside.
    """

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param
        self.retry_after = retry_after
        self.headers = dict(headers or {})

    def envelope(self) -> dict[str, dict[str, str | None]]:
        """The public form: `{"error": {"message", "type", "param", "code"}}`."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(OnebaseError):
    """A request whose fields cannot be served (422)."""

    status, type, code = 422, "invalid_request_error", "invalid_request"


class InvalidAdapter(OnebaseError):
    """An adapter that is refused; `param` names the config field or the tensor (422)."""

    status, type, code = 422, "invalid_request_error", "invalid_adapter"


class TooLarge(OnebaseError):
    """More bytes than a limit allows (413)."""

    status, type, code = 413, "invalid_request_error", "too_large"


class Unauthorized(OnebaseError):
    """No key, or none that may be used: unknown, revoked, expired, or of a disabled tenant, all in the same words, so
    that an answer says nothing about which keys exist (401)."""

    status, type, code = 401, "authentication_error", "invalid_api_key"

    def __init__(self) -> None:
        super().__init__(
            "no valid API key: send the header `Authorization: Bearer ob_<id>_<secret>`",
            headers={"WWW-Authenticate": 'Bearer realm="onebase"'},
        )


class Forbidden(OnebaseError):
    """Something the settings do not allow this caller (403)."""

    status, type, code = 403, "permission_error", "forbidden"


class AdapterNotFound(OnebaseError):
    """No adapter, or no version, of that name (404)."""

    status, type, code = 404, "not_found_error", "adapter_not_found"


class TenantNotFound(OnebaseError):
    """No tenant of that name, or no such key of it; only admin calls say so (404)."""

    status, type, code = 404, "not_found_error", "tenant_not_found"


class Conflict(OnebaseError):
    """The change cannot be made in the present state (409)."""

    status, type, code = 409, "conflict_error", "conflict"


class PreconditionFailed(OnebaseError):
    """`If-Match` or `If-None-Match` did not hold (412)."""

    status, type, code = 412, "precondition_error", "precondition_failed"


class RateLimited(OnebaseError):
    """The tenant's own limit is reached (429, with `Retry-After`, and `x-ratelimit-*` of its limits a minute)."""

    status, type, code = 429, "rate_limit_error", "rate_limited"


class QueueShare(RateLimited):
    """The tenant has its part of the server's queue, of which the rest is for others (429, with `Retry-After`)."""

    code = "queue_share"


class Overloaded(OnebaseError):
    """The server's own limit is reached, or it is draining (503, with `Retry-After`)."""

    status, type, code = 503, "overloaded_error", "overloaded"


class LedgerUnavailable(OnebaseError):
    """What a request uses cannot be written down at present (503, with `Retry-After`)."""

    status, type, code = 503, "overloaded_error", "ledger_unavailable"


class AdapterUnavailable(OnebaseError):
    """A stored adapter could not be read back: missing, or its bytes no longer match its digest (500)."""

    code = "adapter_unavailable"


class EngineFailure(OnebaseError):
    """The step that held this request failed, or the engine (500)."""

    code = "engine_failure"


class UnusableOutput(EngineFailure):
    """The model's output for this request was not finite, or no text, as an adapter can make it (500)."""

    code = "unusable_output"


class StorageFailure(OnebaseError):
    """The data directory could not take a write (disk full, permissions); nothing was changed (507)."""

    status, code = 507, "storage_failure"
