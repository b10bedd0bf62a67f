"""Trains the bundled tokenizer: byte-level BPE with the control tokens of DeepSeek-V4.

    python -m triptych.tiny.vocabulary --docs FOLDER

Ids 0, 1, 2 and the `special` flags are those of the released tokenizer: role, think and DSML tokens are added tokens
that are not special, so that decoding keeps them (reference section 6.1). Digits are single tokens, so that a number's
digits are copied one by one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from triptych.tiny.corpus import SOURCES, documents, held_out
from triptych.tiny.shape import TOKENIZER_FILE, VOCAB_SIZE

SPECIAL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
CONTROL = (
    "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜User｜>", "<｜Assistant｜>", "<|EOT|>",
    "<think>", "</think>", "｜DSML｜", "<｜begin▁sys｜>", "<｜end▁sys｜>", "<｜System｜>",
    "<｜latest_reminder｜>", "<｜action｜>", "<｜query｜>", "<｜authority｜>", "<｜domain｜>", "<｜title｜>",
    "<｜extracted_url｜>", "<｜read_url｜>", "<｜image｜>", "<｜box｜>", "<｜/box｜>", "<｜point｜>",
    "<｜/point｜>", "<｜polygon｜>", "<｜/polygon｜>", "<｜ref｜>", "<｜/ref｜>",
)  # fmt: skip
_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def added_token(index: int, content: str, special: bool) -> dict[str, Any]:
    """One record of `added_tokens`."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special, "special": special}
    return {"id": index, "content": content, **flags}


def train(docs: Path) -> dict[str, Any]:
    """The tokenizer.json of exactly VOCAB_SIZE ids, trained on the training documents of `corpus.SOURCES`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        split(Regex(r"\p{N}"), "isolated"),
        split(Regex(_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(CONTROL),
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=16,
        show_progress=False,
    )
    texts = (text for source in SOURCES for name, text in documents(source, docs) if not held_out(name))
    tokenizer.train_from_iterator(texts, trainer)
    raw: dict[str, Any] = json.loads(tokenizer.to_str())
    first = len(raw["model"]["vocab"])
    raw["added_tokens"] = [added_token(i, text, True) for i, text in enumerate(SPECIAL)]
    raw["added_tokens"] += [added_token(first + i, text, False) for i, text in enumerate(CONTROL)]
    if first + len(CONTROL) != VOCAB_SIZE:
        raise ValueError(f"The corpus gave {first} entries, not {VOCAB_SIZE - len(CONTROL)}; it is too small.")
    return raw


def main() -> None:
    """Write the packaged tokenizer.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, required=True, help="folder with one unpacked package per sub-folder")
    raw = train(parser.parse_args().docs)
    TOKENIZER_FILE.write_text(json.dumps(raw, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
