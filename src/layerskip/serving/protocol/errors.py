"""Errors as OpenAI's API has them: a status, and a body with message, type, param and code."""

from collections.abc import Mapping
from typing import Any

from layerskip.errors import InvalidArgumentError, LayerSkipError, PromptTooLongError, TokenizerError

RETRY_SECONDS = 1


class ApiError(Exception):
    """A request that can't be answered."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Say what is wrong.

        Args:
            status: HTTP status.
            message: What was given, what is allowed and what to do.
            param: The field of the request that is wrong.
            code: A name for programs.
            headers: Of the response.
        """
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """What the client gets, as JSON."""
        error = {"message": self.message, "type": kind_of(self.status), "param": self.param, "code": self.code}
        return {"error": error}


def kind_of(status: int) -> str:
    """OpenAI's name for errors with a status."""
    names = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    if status in names:
        return names[status]
    return "invalid_request_error" if status < 500 else "server_error"


def busy(message: str, code: str) -> ApiError:
    """The server can't take the request now; the client may try again."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(RETRY_SECONDS)})


def api_error(error: Exception, param: str | None = None) -> ApiError:
    """An error of this package as one of the API; of others, clients learn nothing."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLongError):
        return ApiError(400, str(error), param=param, code="context_length_exceeded")
    if isinstance(error, InvalidArgumentError):
        return ApiError(400, str(error), param=param or named_field(str(error)), code="invalid_value")
    if isinstance(error, TokenizerError):  # the model can't do what is asked: no chats without a template
        return ApiError(400, str(error), param=param, code="unsupported_by_model")
    if isinstance(error, LayerSkipError):
        return ApiError(500, str(error), code="generation_failed")
    return ApiError(500, "the server failed to answer this request; its log says why", code="internal_error")


FIELDS = (
    "max_new_tokens num_speculations exit_layer seed temperature top_k top_p min_p repetition_penalty "
    "generation_strategy no_repeat_ngram_size frequency_penalty presence_penalty logit_bias stop logprobs"
).split()


def named_field(message: str) -> str | None:
    """The field that a message of `GenerationConfig` begins with."""
    first = message.partition(" ")[0]
    return first if first in FIELDS else None
