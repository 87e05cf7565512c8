"""Texts as tokens, and back."""

from typing import Any

from fastapi import APIRouter

from layerskip.errors import InvalidArgumentError
from layerskip.serving.conversation.messages import to_messages
from layerskip.serving.protocol.errors import ApiError
from layerskip.serving.protocol.requests import DetokenizeBody, TokenizeBody
from layerskip.serving.routes.depends import ServiceOf

router = APIRouter(tags=["server"])


@router.post("/tokenize", summary="Token ids of a text or a conversation")
async def tokenize(body: TokenizeBody, service: ServiceOf) -> dict[str, Any]:
    """As vLLM has it."""
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt", code="invalid_value")

    def work() -> list[int]:
        if body.messages is not None:
            return service.lm.encode_chat(to_messages(body.messages))
        special = True if body.add_special_tokens is None else body.add_special_tokens
        return service.lm.encode(body.prompt, special_tokens=special)[0] if body.prompt else []

    tokens = await service.aside(work)
    return {"tokens": tokens, "count": len(tokens), "max_model_len": service.cache.capacity}


@router.post("/detokenize", summary="Text of token ids")
async def detokenize(body: DetokenizeBody, service: ServiceOf) -> dict[str, str]:
    """As vLLM has it."""
    service.check_model(body.model)
    try:
        service.lm.config.check_token_ids(body.tokens, "tokens")
    except InvalidArgumentError as error:
        raise ApiError(400, str(error), param="tokens", code="invalid_value") from error
    text = service.lm.text_tokenizer.decode(body.tokens, clean_up_tokenization_spaces=False)
    return {"prompt": str(text)}
