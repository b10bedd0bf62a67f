"""Writes docs/tiny.md and the model card from the records of the training; no number in either is typed by hand.

python -m triptych.tiny.card --records docs/tiny --page docs/tiny.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from triptych.tiny.bundle import PACKAGED
from triptych.tiny.shape import TINY_SHAPE

Rows = list[dict[str, Any]]
CARD = PACKAGED / "README.md"


class Records:
    """The files of one training: two runs' logs, the final measurements and the corpus."""

    def __init__(self, folder: Path) -> None:
        self.runs = [_lines(folder / f"train-{i}.jsonl") for i in (1, 2)]
        self.final = _lines(folder / "final.jsonl")
        self.paths = _lines(folder / "paths.jsonl")
        self.draft = next(row for row in _lines(folder / "draft.jsonl") if row["event"] == "draft")
        self.corpus = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        self.engine = json.loads((folder / "engine.json").read_text(encoding="utf-8"))

    def retrieval(self) -> Rows:
        """Final accuracy rows, one per length."""
        return [row for row in self.final if row["event"] == "retrieval"]

    def text_loss(self, run: int) -> float:
        """Held-out loss of the weights as stored, after a run."""
        [row] = [row for row in self.runs[run] if row.get("event") == "text"]
        return float(row["loss"])

    def steps(self, run: int) -> Rows:
        """Log lines of training steps."""
        return [row for row in self.runs[run] if "lesson" in row]


def _lines(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _length(tokens: int) -> str:
    return f"{tokens // 2**20}M" if tokens >= 2**20 else f"{tokens // 1024}K"


def accuracy_table(records: Records) -> str:
    """Exact match by length and depth, measured with the training net on the GPU."""
    rows = records.retrieval()
    depths = [f"{i * 10 + 5} %" for i in range(len(rows[0]["by_depth"]))]
    body = [
        [_length(r["length"]), str(r["questions"]), f"**{_share(r['accuracy'])}**", *(_share(d) for d in r["by_depth"])]
        for r in rows
    ]
    return table(["context", "questions", "exact match", *depths], body)


def recall_table(records: Records) -> str:
    """Share of a value's entries that each CSA layer's indexer selects when the answer is read."""
    layers = [f"layer {layer}" for layer in TINY_SHAPE.csa_layers]
    body = [[_length(r["length"]), *(_share(x) for x in r["indexer_recall"])] for r in records.retrieval()]
    return table(["context", *layers], body)


def engine_table(records: Records) -> str:
    """The same kind of questions through the engine with its prefix cache, alone and in one conversation."""
    body = []
    for row in records.engine["summary"]:
        mine = [r for r in records.engine["rows"] if r["length"] == row["length"]]
        prompt = sum(r["answer"]["prompt_tokens"] for r in mine)
        cached = sum(r["answer"]["cached_tokens"] for r in mine)
        body.append([_length(row["length"]), str(len(mine)), _share(row["alone"]), _share(row["together"]),
                     _share(cached / prompt)])  # fmt: skip
    return table(["context", "questions", "asked alone", "in one conversation", "prompt tokens from the cache"], body)


def path_table(records: Records) -> str:
    """Whether the cache path or the numerics change an answer."""
    body = []
    for row in records.paths:
        margins = ", ".join(f"{m:.2f}" for m in row["margins"]) or "-"
        body.append([row["path"], str(row["questions"]), str(row["right"]), str(row["same"]), margins])
    return table(["engine", "questions", "right", "same tokens", "nats the default was ahead where they part"], body)


def lesson_table(records: Records) -> str:
    """Where each lesson of each run ended."""
    body = []
    for run in range(len(records.runs)):
        steps = records.steps(run)
        for name in dict.fromkeys(row["lesson"] for row in steps):
            mine = [row for row in steps if row["lesson"] == name]
            last = mine[-1]
            body.append([str(run + 1), name, str(last["step"]), f"{last['seconds']:.0f}", f"{last['loss']:.2f}",
                         f"{last['index']:.2f}", _share(last["accuracy"])])  # fmt: skip
    head = ["run", "lesson", "until step", "until second", "loss", "indexer loss", "answers right"]
    return table(head, body)


def source_table(records: Records) -> str:
    """What the corpus consists of."""
    body = [[s["name"], s["licence"], s["package"], f"{s['tokens'] / 1e6:.2f} M", str(sum(s["documents"].values()))]
            for s in records.corpus["sources"]]  # fmt: skip
    return table(["source", "licence", "package", "tokens", "documents"], body)


def twin_sentence(records: Records) -> str:
    """The comparison with full attention."""
    tiny, twin = (next(r for r in records.final if r.get("name") == n) for n in ("tiny", "dense twin"))
    change = tiny["loss"] / twin["loss"] - 1
    return (
        f"After {tiny['tokens'] / 1e6:.1f} M tokens of plain text from one seed, with the same batches and rates, the\n"
        f"architecture reaches a held-out loss of {tiny['loss']:.3f} nats per token ({tiny['parameters'] / 1e6:.1f} M "
        f"parameters) and its\ntwin with full attention {twin['loss']:.3f} ({twin['parameters'] / 1e6:.1f} M): "
        f"{100 * change:+.1f} %. That is one seed, early in training and at 4K\ntokens: it says that compression does "
        "not cost much here, not more."
    )


def facts(records: Records) -> dict[str, str]:
    """Every number that the texts below need."""
    ends = [records.steps(run)[-1] for run in range(len(records.runs))]
    start = next(row for row in records.runs[0] if row.get("event") == "start")
    return {
        "parameters": f"{start['parameters'] / 1e6:.1f} M",
        "megabytes": f"{sum(f.stat().st_size for f in PACKAGED.glob('*.safetensors')) / 1e6:.1f} MB",
        "minutes": " and ".join(f"{end['seconds'] / 60:.1f}" for end in ends),
        "tokens": " and ".join(f"{end['tokens'] / 1e6:.0f} M" for end in ends),
        "torch": str(start["torch"]),
        "train_tokens": f"{records.corpus['tokens']['train'] / 1e6:.1f} M",
        "held_tokens": f"{records.corpus['tokens']['held_out'] / 1e6:.2f} M",
        "loss_1": f"{records.text_loss(0):.3f}",
        "loss_2": f"{records.text_loss(1):.3f}",
        "same": _share(records.draft["same_as_backbone"]),
        "right": _share(records.draft["same_as_text"]),
        "accuracy": accuracy_table(records),
        "recall": recall_table(records),
        "engine": engine_table(records),
        "paths": path_table(records),
        "lessons": lesson_table(records),
        "sources": source_table(records),
        "twin": twin_sentence(records),
        "vocabulary": str(TINY_SHAPE.vocab_size),
        "topk": str(TINY_SHAPE.index_topk),
    }


def render(template: str, records: Records) -> str:
    """A template of this package with its {names} filled in."""
    text = Path(__file__).with_name(template).read_text(encoding="utf-8")
    return text.format(**facts(records))


def main() -> None:
    """Write both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=Path("docs/tiny"))
    parser.add_argument("--page", type=Path, default=Path("docs/tiny.md"))
    args = parser.parse_args()
    records = Records(args.records)
    args.page.write_text(render("page.md", records), encoding="utf-8")
    CARD.write_text(render("card.md", records), encoding="utf-8")


if __name__ == "__main__":
    main()
