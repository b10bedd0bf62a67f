"""The JSON that goes out, as OpenAI's API defines it. msgspec structs: a streamed chunk costs microseconds."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from triptych.words import Usage

encode = msgspec.json.encode


def event(value: object) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"
COMMENT = b": still working\n\n"  # keeps proxies and clients from giving up during a long prefill


class PromptDetails(Struct):
    """Where prompt tokens came from. All but `cached_tokens` is ours.

    `recomputed_tokens`: cached, but run again to rebuild window state. `cached_by_tier`: how many of the cached ones
    were fetched from below the device, by tier. `approximate`: windows were rebuilt inexactly, as the operator allowed.
    """

    cached_tokens: int
    recomputed_tokens: int
    cached_by_tier: dict[str, int] | UnsetType = UNSET
    approximate: bool | UnsetType = UNSET


class CompletionDetails(Struct):
    """How many of the completion tokens were thought and not said. `by_weights`, ours: how many each version of the
    weights sampled, where they were replaced since the server started.
    """

    reasoning_tokens: int
    by_weights: dict[int, int] | UnsetType = UNSET


class WireUsage(Struct):
    """Token counts of a whole request, over all prompts and samples."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | UnsetType = UNSET
    completion_tokens_details: CompletionDetails | UnsetType = UNSET

    @classmethod
    def so_far(cls, prompt: int, completion: int) -> WireUsage:
        """The count of an answer that has not ended: where its prompt came from is told at the end."""
        return cls(prompt, completion, prompt + completion)

    @classmethod
    def of(cls, usage: Usage, reasoning_tokens: int = 0) -> WireUsage:
        """The wire form of the engine's count."""
        by_weights = usage.completion_by_weights
        details = PromptDetails(
            usage.cached_tokens,
            usage.recomputed_tokens,
            dict(usage.cached_by_tier) or UNSET,
            usage.approximate or UNSET,
        )
        return cls(
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.total_tokens,
            details,
            CompletionDetails(reasoning_tokens, dict(by_weights) if any(by_weights) else UNSET),
        )


class TopLogprob(Struct):
    """One candidate token of chat logprobs. `bytes` is exact where `token` is not valid UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(Struct):
    """The chosen token of chat logprobs and its alternatives, best first."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    """Logprobs of one piece of a chat answer."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatFunction(Struct, omit_defaults=True):
    """The function of a tool call: the name comes with the first piece, the arguments in all of them."""

    arguments: str | None = None
    name: str | None = None


class ChatCallDelta(Struct, omit_defaults=True):
    """What a tool call gains. `id` and `type` come with its first piece."""

    index: int
    function: ChatFunction
    id: str | None = None
    type: str | None = None


class ChatDelta(Struct, omit_defaults=True):
    """What a chat choice gains; the first one names the role, the last one is empty."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ChatCallDelta] | None = None


class ChatChunkChoice(Struct):
    """One choice of a streamed chat chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(Struct):
    """A streamed chat chunk. `usage` is absent, null before the end, or the count so far, as the client asked."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: WireUsage | UnsetType | None = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class ChatCall(Struct):
    """A whole tool call."""

    id: str
    function: ChatFunction
    type: Literal["function"] = "function"


class ChatMessage(Struct):
    """A whole chat answer. `content` is null where the model only called tools."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ChatCall] | UnsetType = UNSET


class ChatChoice(Struct):
    """One choice of a whole chat answer."""

    index: int
    message: ChatMessage
    finish_reason: str
    logprobs: ChatLogprobs | None = None


class RankedToken(Struct):
    """A token in vLLM's `prompt_logprobs`; rank 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


class ChatCompletion(Struct):
    """A whole chat response. `prompt_logprobs`, as vLLM has them: by token id, for each token from the second on."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: WireUsage
    prompt_logprobs: list[dict[str, RankedToken] | None] | UnsetType = UNSET
    object: Literal["chat.completion"] = "chat.completion"


class TextLogprobs(Struct):
    """Logprobs of /v1/completions: four lists of one length. `text_offset` counts characters of the choice's text.

    The first token of a prompt that is echoed has none.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(Struct):
    """One choice of /v1/completions, whole or a piece. `token_ids`: what was sampled, if it was asked for;
    `prompt_logprobs`, as vLLM has them: by token id, for each token of the prompt from the second on."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[dict[str, RankedToken] | None] | UnsetType = UNSET


class TextCompletion(Struct):
    """A response of /v1/completions, whole or a chunk."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: WireUsage | UnsetType | None = UNSET
    object: Literal["text_completion"] = "text_completion"


class WireError(Struct):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(Struct):
    """The body of every response that is an error."""

    error: WireError


class Tokens(Struct):
    """The body of /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | UnsetType = UNSET


class Text(Struct):
    """The body of /detokenize."""

    prompt: str


class AnthropicFault(Struct):
    """What went wrong, in Anthropic's words."""

    type: str
    message: str


class AnthropicError(Struct):
    """The body of every response of Anthropic's API that is an error, and of its error event."""

    error: AnthropicFault
    request_id: str | UnsetType = UNSET
    type: Literal["error"] = "error"

    @classmethod
    def of(cls, sentence: str, status: int, request_id: str | UnsetType = UNSET) -> AnthropicError:
        """The error for an HTTP status."""
        kinds = {
            **{401: "authentication_error", 403: "permission_error", 404: "not_found_error"},
            **{413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"},
        }
        kind = kinds.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return cls(AnthropicFault(kind, sentence), request_id)


class Model(Struct):
    """One name that this server answers to. `max_model_len` is prompt and answer together, in tokens."""

    id: str
    created: int
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: Literal["triptych"] = "triptych"


class ModelList(Struct):
    """The body of /v1/models."""

    data: list[Model]
    object: Literal["list"] = "list"
