"""A tokenizer.json made by hand: one id per byte, two merges, a few control tokens."""

from __future__ import annotations

from typing import Any

import tokenizers

CONTROLS = ["<bos>", "<eos>", "<think>", "</think>", "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"]


def byte_tokenizer_json() -> dict[str, Any]:
    """Ids 0..255 are bytes in the alphabet's order, then "ab" and "abc", then the controls; bos and eos are special."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "ab", "abc"]
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": len(tokens) + i,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": i < 2,
            }
            for i, text in enumerate(CONTROLS)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [["a", "b"], ["ab", "c"]],
        },
    }
