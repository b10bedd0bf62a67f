"""A conversation as DeepSeek-V4 reads it, without thinking and without tools (reference section 6.2):

    BOS system <|User|> u1 <|Assistant|></think> a1 EOS <|User|> u2 <|Assistant|></think>

Nothing stands between the parts. Texts are encoded one by one and control tokens are put in by id, so a user who
types a control token's spelling sends plain text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from triptych.errors import ContextTooLong, RequestError
from triptych.text.messages import Message, Role, merge
from triptych.text.tokenizer import Tokenizer
from triptych.words import TokenIds

_USER = "<\uff5cUser\uff5c>"
_ASSISTANT = "<\uff5cAssistant\uff5c>"
_NO_THINKING = "</think>"


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPrompt:
    """Token ids [n] and the semantic boundaries in them, ascending.

    `ids[:b]` of a boundary b ends with a whole system text, user turn or assistant turn (its EOS included): the
    places where later prompts of the same conversation, or of others with the same system text, may part ways.
    """

    ids: TokenIds
    boundaries: tuple[int, ...] = ()


def render(messages: tuple[Message, ...], tokenizer: Tokenizer, *, limit: int | None = None) -> EncodedPrompt:
    """The prompt that asks for the next assistant turn. Raises ContextTooLong beyond `limit` tokens."""
    if tokenizer.bos_id is None or tokenizer.eos_id is None:
        raise RequestError("This model's tokenizer names no BOS or EOS token, which chat needs.")
    user, assistant = tokenizer.control_id(_USER), tokenizer.control_id(_ASSISTANT)
    slot = [assistant, tokenizer.control_id(_NO_THINKING)]
    turns = merge(messages)
    texts = tokenizer.encode_texts([turn.text for turn in turns], limit=limit)
    parts: list[TokenIds | list[int]] = [[tokenizer.bos_id]]
    boundaries: list[int] = []
    position = 1
    for turn, text in zip(turns, texts, strict=True):
        around = {Role.SYSTEM: ([], []), Role.USER: ([user], []), Role.ASSISTANT: (slot, [tokenizer.eos_id])}
        before, after = around[turn.role]
        parts += [before, text, after]
        position += len(before) + len(text) + len(after)
        boundaries.append(position)
    parts.append(slot)
    ids = np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])
    if limit is not None and len(ids) > limit:
        raise ContextTooLong(f"The prompt has {len(ids)} tokens; at most {limit} fit here.", "Shorten the prompt.")
    ids.flags.writeable = False
    return EncodedPrompt(ids, tuple(boundaries))
