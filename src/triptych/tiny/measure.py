"""How well a net finds facts: accuracy by length and depth, and the indexer's recall, without an engine.

One document holds ten facts at ten depths (and as many near misses); each is asked on its own, directly behind the
document. Greedy decoding gives the right answer exactly if every answer token is the argmax after the ones before it,
which one pass over question and answer shows.

    python -m triptych.tiny.measure --corpus corpus.npz --plan 1024:4,4096:4 --text 4 --draft 8
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from triptych.config import CSA_RATIO, PAGE
from triptych.tiny.attention import Past
from triptych.tiny.data import BOS, Chat, load_text
from triptych.tiny.facts import Fact, draw_facts
from triptych.tiny.net import Mode, Net

DEPTHS = tuple(i / 10 + 0.05 for i in range(10))


@dataclass(frozen=True, slots=True)
class Document:
    """`ids` [length] of a prompt up to the question, the facts asked about, and the entry where each value begins."""

    ids: npt.NDArray[np.int64]
    facts: tuple[Fact, ...]
    entries: tuple[int, ...]


def document(chat: Chat, text: npt.NDArray[np.uint16], length: int, seed: int,
             depths: Sequence[float] = DEPTHS) -> Document:  # fmt: skip
    """BOS <User> and filler of `text` (repeated if short) with one fact per depth and near misses in between."""
    rng = np.random.default_rng([seed, length])
    facts = draw_facts(rng, 2 * len(depths), held_out=True)
    statements = [chat.ids(f.statement) for f in facts]
    room = length - 2 - sum(map(len, statements))
    offset = int(rng.integers(0, len(text)))
    filler = np.take(text, np.arange(offset, offset + room), mode="wrap").astype(np.int64)
    places = np.concatenate([np.asarray(depths), rng.random(len(depths))]) * room
    order = np.argsort(places, kind="stable")
    parts, at, low, begins = [np.asarray([BOS, chat.user])], 2, 0, [0] * len(facts)
    for i in order:
        high = int(places[i])
        parts += [filler[low:high], statements[i]]
        begins[i] = at + high - low
        at, low = begins[i] + len(statements[i]), high
    asked = range(len(depths))
    lead = [len(statements[i]) - len(facts[i].value) - 1 for i in asked]
    entries = tuple((begins[i] + n) // CSA_RATIO for i, n in zip(asked, lead, strict=True))
    return Document(np.concatenate([*parts, filler[low:]]), tuple(facts[: len(depths)]), entries)


def _prefill(net: Net, ids: Tensor, mode: Mode, chunk: int) -> list[Past] | None:
    """The past after ids [1, S], run in chunks."""
    past = None
    for low in range(0, ids.shape[1], chunk):
        part = ids[:, low : low + chunk]
        positions = torch.arange(low, low + part.shape[1], device=ids.device)[None]
        _, run = net.streams(part, positions, mode, past, low)
        past = run.past
    return past


def _spread(past: list[Past], count: int) -> list[Past]:
    def wide(x: Tensor | None) -> Any:
        return None if x is None else x.expand(count, *x.shape[1:])

    return [Past(wide(p.rows), wide(p.entries), wide(p.keys), [(wide(a), wide(b)) for a, b in p.tails]) for p in past]


@torch.no_grad()
def ask(net: Net, chat: Chat, doc: Document, mode: Mode, chunk: int = 32768) -> tuple[list[bool], list[float]]:
    """Whether each fact of `doc` is answered exactly, and each CSA layer's recall of the values' entries."""
    device = net.embed.weight.device
    length = len(doc.ids)
    past = _prefill(net, torch.from_numpy(doc.ids)[None].to(device), mode, chunk)
    assert past is not None
    turns = [chat.turn(fact, first=True) for fact in doc.facts]
    rows = torch.zeros(len(turns), PAGE, dtype=torch.long)
    hinted = torch.full_like(rows, -1)
    for i, (question, answer) in enumerate(turns):
        rows[i, : len(question) + len(answer)] = torch.from_numpy(np.concatenate([question, answer]))
        hinted[i, len(question) - 1 : len(question) + len(answer) - 2] = doc.entries[i]
    positions = torch.arange(length, length + PAGE, device=device).expand(len(turns), -1)
    asked = Mode(dtype=mode.dtype, topk=mode.topk, hinted=hinted.to(device))
    streams, run = net.streams(rows.to(device), positions, asked, _spread(past, len(turns)), length)
    best = net.logits(net.hidden(streams, net)).argmax(-1).view(len(turns), PAGE).cpu()
    right = []
    for i, (question, answer) in enumerate(turns):
        low = len(question) - 1
        right.append(bool((best[i, low : low + len(answer)] == torch.from_numpy(answer)).all()))
    return right, [float(r) for r in run.recall]


def measure(net: Net, text: npt.NDArray[np.uint16], plan: Sequence[tuple[int, int]], mode: Mode,
            seed: int = 1000) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One result row per (length, documents) of `plan`: accuracy, by depth, and recall per CSA layer."""
    chat = Chat()
    mode = Mode(dtype=mode.dtype, topk=mode.topk, keep=True)
    for length, count in plan:
        # the last page is the question's
        docs = (document(chat, text, length - PAGE, seed + i) for i in range(count))
        results = [ask(net, chat, doc, mode) for doc in docs]
        right = np.asarray([r for r, _ in results], dtype=float)
        recall = np.asarray([r for _, r in results if r])
        yield {
            "length": length, "documents": count, "questions": int(right.size), "topk": mode.topk,
            "accuracy": float(right.mean()), "by_depth": right.mean(0).round(4).tolist(),
            "indexer_recall": recall.mean(0).round(4).tolist() if recall.size else None,
        }  # fmt: skip


@torch.no_grad()
def text_loss(net: Net, text: npt.NDArray[np.uint16], mode: Mode, length: int = 4096, count: int = 16) -> float:
    """Mean cross-entropy in nats per token over `count` spans of held-out text, all positions."""
    total = 0.0
    for i in range(count):
        start = i * (len(text) - length - 1) // max(count - 1, 1)
        span = torch.from_numpy(text[start : start + length + 1].astype(np.int64)).to(net.embed.weight.device)
        positions = torch.arange(length, device=span.device)[None]
        streams, _ = net.streams(span[None, :-1], positions, mode)
        logits = net.logits(net.hidden(streams, net)).float()
        total += float(torch.nn.functional.cross_entropy(logits, span[1:]))
    return total / count


@torch.no_grad()
def draft_agreement(
    net: Net, text: npt.NDArray[np.uint16], mode: Mode, length: int = 1024, count: int = 8
) -> tuple[float, float]:
    """How often the MTP block's first guess for the token after next is the backbone's, and is the text's."""
    same, right, total = 0, 0, 0
    for i in range(count):
        start = i * (len(text) - length - 1) // max(count - 1, 1)
        ids = torch.from_numpy(text[start : start + length].astype(np.int64))[None].to(net.embed.weight.device)
        positions = torch.arange(length, device=ids.device)[None]
        streams, _ = net.streams(ids, positions, mode)
        own = net.logits(net.hidden(streams, net)).argmax(-1)
        drafted, _ = net.draft_streams(streams, ids, positions, mode)
        guess = net.logits(net.hidden(drafted, net.draft_block)).argmax(-1)
        same += int((guess[:-2] == own[1:-1]).sum())
        right += int((guess[:-2] == ids[0, 2:]).sum())
        total += length - 2
    return same / total, right / total


def main() -> None:
    """Measure a checkpoint in the official layout, by default the packaged one; one JSON line per result."""
    from triptych.checkpoint import CheckpointReader
    from triptych.tiny.bundle import PACKAGED
    from triptych.tiny.export import load_official

    parser = argparse.ArgumentParser(description="Measures a tiny checkpoint with the training net.")
    parser.add_argument("--corpus", type=Path, required=True, help="the file that triptych.tiny.corpus wrote")
    parser.add_argument("--checkpoint", type=Path, default=PACKAGED)
    parser.add_argument("--plan", default="", help="retrieval: LENGTH:DOCUMENTS,...")
    parser.add_argument("--text", type=int, default=0, help="spans of 4096 held-out tokens for the text loss")
    parser.add_argument("--draft", type=int, default=0, help="spans of 1024 held-out tokens for the MTP block")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    reader = CheckpointReader(args.checkpoint)
    net = Net(reader.shape)
    load_official(net, dict(reader.tensors(dtype=torch.float32)))
    net.to(args.device)
    text = load_text(args.corpus, "held_out")
    mode = Mode(topk=reader.shape.index_topk)
    plan = [(int(a), int(b)) for a, b in (item.split(":") for item in args.plan.split(",") if item)]
    for row in measure(net, text, plan, mode):
        print(json.dumps({"event": "retrieval", **row}), flush=True)
    if args.text:
        print(json.dumps({"event": "text", "loss": text_loss(net, text, mode, count=args.text)}), flush=True)
    if args.draft:
        same, right = draft_agreement(net, text, mode, count=args.draft)
        print(json.dumps({"event": "draft", "same_as_backbone": same, "same_as_text": right}), flush=True)


if __name__ == "__main__":
    main()
