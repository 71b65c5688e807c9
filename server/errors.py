"""Every error that may reach a user, with the HTTP status it becomes.

The layers below `api/` raise these; `api/` turns them into the error envelope. None of them carries a traceback
or a path of this machine.
"""

from __future__ import annotations


class OnebaseError(Exception):
    """A fault with a reason for the user: `message`, `code`, the `param` at fault, and an HTTP `status`."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(
        self, message: str, *, code: str | None = None, param: str | None = None, retry_after: int | None = None
    ):
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param
        self.retry_after = retry_after

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


class Forbidden(OnebaseError):
    """Something the settings do not allow this caller (403)."""

    status, type, code = 403, "permission_error", "forbidden"


class AdapterNotFound(OnebaseError):
    """No adapter, or no version, of that name (404)."""

    status, type, code = 404, "not_found_error", "adapter_not_found"


class Conflict(OnebaseError):
    """The change cannot be made in the present state (409)."""

    status, type, code = 409, "conflict_error", "conflict"


class PreconditionFailed(OnebaseError):
    """`If-Match` or `If-None-Match` did not hold (412)."""

    status, type, code = 412, "precondition_error", "precondition_failed"


class Overloaded(OnebaseError):
    """The server's own limit is reached, or it is draining (503, with `Retry-After`)."""

    status, type, code = 503, "overloaded_error", "overloaded"


class AdapterUnavailable(OnebaseError):
    """A stored adapter could not be read back: missing, or its bytes no longer match its digest (500)."""

    code = "adapter_unavailable"


class EngineFailure(OnebaseError):
    """The step that held this request failed, or its numbers were not finite (500)."""

    code = "engine_failure"


class StorageFailure(OnebaseError):
    """The data directory could not take a write (disk full, permissions); nothing was changed (507)."""

    status, code = 507, "storage_failure"
