"""/v1/completions: raw prompts as text or token ids. Text is taken as it is: no BOS, no control tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from msgspec import UNSET, UnsetType

from triptych.errors import RequestError, TriptychError, Unsupported
from triptych.server.ask import HARMLESS, STREAM_FIELDS, Ask, Counting, Desk, Head, stream_fields
from triptych.server.fields import Fields, FieldTable, shown, wrong
from triptych.server.generation import Api
from triptych.server.hints import HINT_FIELDS, cache_hints
from triptych.server.http import error_body
from triptych.server.logprobs import TextLogprobWriter, echoed, ranked
from triptych.server.pieces import Answer, Content, Step
from triptych.server.protocol import ServingEngine
from triptych.server.sampling import SAMPLING_FIELDS, blaming, check_room, check_scores, sampling_params
from triptych.server.wire import TextChoice, TextCompletion, WireUsage
from triptych.text.tokenizer import Tokenizer
from triptych.words import PromptLogprobs, TokenIds, Usage, token_ids

_DEFAULT_MAX_TOKENS = 16  # as OpenAI's API documents

_OWN_FIELDS = {"prompt", "logprobs", "prompt_logprobs", "best_of", "echo", "return_token_ids"}
FIELDS = FieldTable(
    read=SAMPLING_FIELDS | STREAM_FIELDS | HINT_FIELDS | _OWN_FIELDS,
    harmless=HARMLESS,
    refused={"suffix": ("",)},
)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the answer shows beside the text: the prompt's text before it, the ids that were sampled, and for `listed`
    likeliest tokens vLLM's list of the prompt's log-probabilities. `silent`: the prompt alone, without the one token
    that the engine samples."""

    echo: bool
    ids: bool
    listed: int | None
    silent: bool


def read_completion(raw: dict[str, object], desk: Desk) -> Ask:
    """The Ask in a request body. Tokenises: not for the event loop. Raises RequestError."""
    FIELDS.check(raw)
    engine = desk.engine
    fields = Fields(raw)
    stream, include_usage, continuous_usage = stream_fields(fields)
    plan = _plan(fields)
    max_tokens, logprobs = fields.integer("max_tokens"), fields.integer("logprobs")
    wanted = [count for count in (logprobs if plan.echo else None, plan.listed) if count is not None]
    params = sampling_params(
        fields,
        engine.shape.vocab_size,
        max_tokens=1 if plan.silent else _DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        logprobs=logprobs,
        prompt_logprobs=max(wanted, default=None),
    )
    if stream and plan.silent:
        raise Unsupported("max_tokens 0 leaves nothing to stream.", "Leave stream out.", param="stream")
    best_of = fields.integer("best_of")
    if best_of is not None and best_of != params.n:
        raise RequestError("best_of other than n is not supported.", "Leave it out.", param="best_of")
    prompts = _prompts(fields, engine)
    if len(prompts) * params.n > engine.config.max_waiting:
        raise RequestError(
            f"{len(prompts)} prompts with n={params.n} are more than the {engine.config.max_waiting} requests that may"
            " wait at once.",
            "Split them over several requests.",
            param="prompt",
        )
    for prompt in prompts:
        check_room(len(prompt), params.max_tokens, engine.max_context, "prompt")
    check_scores(params, sum(map(len, prompts)), stream)
    hints = cache_hints(fields, desk.salt)
    head = Head.new("cmpl", desk.model)
    return Ask(head, prompts, params, stream, include_usage, continuous_usage, hints, desk.salt, plan=plan)


def _plan(fields: Fields) -> _Plan:
    echo = fields.flag("echo")
    silent = echo and fields.integer("max_tokens") == 0
    return _Plan(echo, fields.flag("return_token_ids"), fields.integer("prompt_logprobs"), silent)


def _prompts(fields: Fields, engine: ServingEngine) -> tuple[TokenIds, ...]:
    """The prompts of any of the four forms: text, texts, ids, lists of ids."""
    raw = fields.value("prompt")
    if raw is None:
        raise RequestError("prompt is missing.", "Give a string, a list of strings, or token ids.", param="prompt")
    if not isinstance(raw, str | list):
        raise wrong("prompt", "a string, a list of strings, or token ids", raw)
    one = isinstance(raw, str) or (raw and not isinstance(raw[0], str | list))
    prompts: list[object] = [raw] if one else list(raw)
    if not prompts or any(prompt in ("", []) for prompt in prompts):
        raise RequestError("The prompt is empty.", "Send at least one token.", param="prompt")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if len(texts) == len(prompts):
        with blaming("prompt"):
            return tuple(engine.tokenizer.encode(text, limit=engine.max_context - 1) for text in texts)
    return tuple(_ids(prompt, engine.shape.vocab_size) for prompt in prompts)


def _ids(prompt: object, vocab_size: int) -> TokenIds:
    if not isinstance(prompt, list):
        raise wrong("prompt", "strings only or token ids only", prompt)
    odd = [item for item in prompt if type(item) is not int][:1]  # bool is an int to isinstance
    if odd:
        raise RequestError(f"A prompt of token ids must hold integers only, not {shown(odd[0])}.", param="prompt")
    return token_ids(prompt, vocab_size=vocab_size)


class TextShape:
    """Spells deltas as completion chunks, and answers as a text completion."""

    def __init__(self, ask: Ask, tokenizer: Tokenizer) -> None:
        self._head = ask.head
        self._include_usage = ask.include_usage
        self._counting = Counting(ask)
        n = ask.params.n
        assert isinstance(ask.plan, _Plan)
        self._plan, self._n, self._tokenizer = ask.plan, n, tokenizer
        self._ids = ask.plan.ids
        self._likeliest = ask.params.logprobs or 0
        self._before = [tokenizer.decode(ask.prompts[c // n]) if ask.plan.echo else "" for c in range(ask.choices)]
        wanted = ask.params.logprobs is not None
        self._writers = [TextLogprobWriter(tokenizer) if wanted else None for _ in range(ask.choices)]

    def opening(self, choice: int) -> list[object]:
        """The prompt, if it is to be echoed."""
        before = self._before[choice]
        return [self._piece(TextChoice(choice, before))] if before else []

    def chunks(self, choice: int, step: Step) -> list[object]:
        """A chunk with text, unless there is nothing to say; the last one has the finish reason."""
        self._counting.add(choice, step)
        text = "".join(piece.text for piece in step.pieces if isinstance(piece, Content))
        if not (text or step.logprobs or step.finish is not None or (self._ids and step.token_ids)):
            return []
        writer = self._writers[choice]
        logprobs = writer.write(step.logprobs) if writer is not None and step.logprobs else None
        ids = list(step.token_ids) if self._ids else UNSET
        return [self._piece(TextChoice(choice, text, logprobs, step.finish, ids))]

    def closing(self, usage: Usage, answers: Sequence[Answer]) -> list[object]:
        """The chunk without choices that carries the usage, if it was asked for."""
        if not self._include_usage:
            return []
        return [self._answer([], WireUsage.of(usage))]

    def error(self, error: TriptychError) -> object:
        """OpenAI's error object."""
        return error_body(error)

    def whole(self, answers: Sequence[Answer], usage: Usage) -> object:
        """The text completion."""
        choices = []
        for i, answer in enumerate(answers):
            said = Answer(finish="length") if self._plan.silent else answer
            choices.append(self._choice(i, said, answers[i - i % self._n].prompt))
        return self._answer(choices, WireUsage.of(replace(usage, completion_tokens=0) if self._plan.silent else usage))

    def _choice(self, index: int, answer: Answer, prompt: PromptLogprobs | None) -> TextChoice:
        """One choice as a whole; `prompt` are the log-probabilities that all choices of a prompt share."""
        writer, listed = self._writers[index], self._plan.listed
        before = echoed(prompt, self._likeliest) if prompt is not None and self._plan.echo else ()
        logprobs = writer.write([*before, *answer.logprobs]) if writer is not None else None
        ids = answer.token_ids if self._ids else UNSET
        scores = UNSET if prompt is None or listed is None else ranked(prompt, listed, self._tokenizer)
        return TextChoice(index, self._before[index] + answer.text, logprobs, answer.finish, ids, scores)

    def _piece(self, choice: TextChoice) -> TextCompletion:
        return self._answer([choice], self._counting.of(choice.index))

    def _answer(self, choices: list[TextChoice], usage: WireUsage | UnsetType | None) -> TextCompletion:
        return TextCompletion(self._head.id, self._head.created, self._head.model, choices, usage)


COMPLETIONS = Api(read_completion, TextShape)
