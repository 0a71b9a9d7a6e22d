"""Errors in the one shape of the API, as OpenAI's has it."""

from collections.abc import Mapping

from pydantic import BaseModel

RETRY_AFTER_S = 10


class ErrorDetail(BaseModel):
    """What is wrong: for people (`message`), and for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every answer whose status is not 2xx."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer whose status is not 2xx.

    Args:
        status: HTTP status.
        message: one sentence for people.
        code: one word for programs.
        param: the field of the request that is to blame.
        headers: further headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = ErrorResponse(error=ErrorDetail(message=message, type=kind, param=param, code=code))
