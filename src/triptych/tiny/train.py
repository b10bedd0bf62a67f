"""Trains the bundled checkpoint on one GPU, in stretches.

    python -m triptych.tiny.train --corpus corpus.npz --state FOLDER --out FOLDER --stretch 9 --total 19

`--state` holds everything a later call needs to go on; `--out` receives weights, the log and measurements. Time, not
steps, drives the curriculum: each stage has a share of the total and ends early once its facts are found. Source of
the recipe: reference dependencies.md section 6; what was changed by measurement is said in docs/tiny.md.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from triptych.tiny.attention import Past
from triptych.tiny.data import Stage, load_text
from triptych.tiny.export import load_weights, round_to_storage
from triptych.tiny.feed import Drawn, Feed
from triptych.tiny.measure import measure, text_loss
from triptych.tiny.net import Block, Mode, Net, Run
from triptych.tiny.ops import Ops
from triptych.tiny.optim import Optimizer
from triptych.tiny.shape import TINY_SHAPE


@dataclass(frozen=True, slots=True)
class Lesson:
    """One stage of the curriculum: its sequences, its share of the time and what the model is given.

    `past` tokens of each sequence run without gradients first, as the past of the rest.
    """

    name: str
    stage: Stage
    share: float
    topk: int | None = None
    extra: int = 0
    rounded: bool = False
    past: int = 0


LESSONS = (
    Lesson("A 256 dense", Stage(256, needles=0.85), 0.18),
    Lesson("B 1K dense", Stage(1024, stretch=0.5), 0.12),
    Lesson("C 4K sparse", Stage(4096, stretch=0.6), 0.18, topk=64, extra=64),
    Lesson("D 16K sparse", Stage(16384, stretch=0.7), 0.24, topk=64, extra=64, rounded=True),
    Lesson(
        "E 256K behind a past",
        Stage(262144, stretch=0.5, needles=1.0),
        0.28,
        topk=64,
        extra=64,
        rounded=True,
        past=196608,
    ),
    # a second run starts from the first one's weights: better text, and more of the long lengths
    Lesson("F 4K mixed", Stage(4096, stretch=0.5, needles=0.45), 0.38, topk=64, extra=64, rounded=True),
    Lesson("G 16K mixed", Stage(16384, stretch=0.7, needles=0.65), 0.22, topk=64, extra=64, rounded=True),
    Lesson("H 64K", Stage(65536, stretch=0.6, needles=0.9), 0.18, topk=64, extra=64, rounded=True),
    Lesson(
        "I 256K behind a past",
        Stage(262144, stretch=0.5, needles=1.0),
        0.22,
        topk=64,
        extra=64,
        rounded=True,
        past=196608,
    ),
)
DRAFT_WEIGHT = 0.1
BALANCE_RATE = 1e-3
GOOD_ENOUGH = 0.96


@dataclass
class Progress:
    """Where a run is; saved with the weights."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    lesson: int = 0
    lesson_seconds: float = 0.0
    accuracy: float = 0.0


def weighted_loss(net: Net, hidden: Tensor, targets: Tensor, weights: Tensor, parts: int = 4) -> tuple[Tensor, Tensor]:
    """Weighted mean cross-entropy, and the argmax [T]; in parts, so that logits never exist whole in float32."""
    losses, best = [], []
    for h, t, w in zip(hidden.chunk(parts), targets.chunk(parts), weights.chunk(parts), strict=True):
        logits = net.logits(h).float()
        losses.append((F.cross_entropy(logits, t, reduction="none") * w).sum())
        best.append(logits.detach().argmax(-1))
    return torch.stack(losses).sum() / weights.sum(), torch.cat(best)


def exact_answers(best: Tensor, targets: Tensor, answer: Tensor) -> Tensor:
    """Share of answers all of whose tokens are right. `answer` [T] marks the rows that predict an answer's tokens."""
    begins = answer & ~F.pad(answer, (1, 0))[:-1]
    which = (begins.cumsum(0) - 1).clamp_min(0)
    wrong = torch.zeros(answer.shape[0], device=best.device).index_add_(0, which, ((best != targets) & answer).float())
    total = begins.sum().clamp_min(1)
    return ((wrong == 0) & (torch.arange(len(wrong), device=best.device) < begins.sum())).sum() / total


class Trainer:
    """One net, its optimizer and the log of one run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("high")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.net = Net(TINY_SHAPE).to(self.device)
        self.fused = Ops(args.compile, scoring=args.compile)
        self.eager = Ops(False, scoring=args.compile)
        self.optimizer = Optimizer(self.net, matrix_rate=args.matrix_rate, other_rate=args.other_rate)
        self.progress = Progress()
        self.feed = Feed(args.corpus, args.seed * 1000 + int(time.time()) % 1000, args.workers)
        args.out.mkdir(parents=True, exist_ok=True)
        args.state.mkdir(parents=True, exist_ok=True)
        self.log_file = (args.out / "log.jsonl").open("a", encoding="utf-8")

    def log(self, **row: Any) -> None:
        """One line of the log."""
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
        self.log_file.write(line + "\n")
        self.log_file.flush()
        print(line, flush=True)

    def factor(self) -> float:
        """Learning-rate factor: a short warm-up, flat, then down to zero over the last `--decay` of the time."""
        warm = min(1.0, (self.progress.step + 1) / 100)
        done = self.progress.seconds / (60 * self.args.total)
        decayed: float = min(1.0, (1 - done) / self.args.decay)
        return warm * max(0.02, decayed)

    def step(self, lesson: Lesson) -> dict[str, Tensor]:
        """One update; returns the quantities to log, still on the device."""
        args, net, stage = self.args, self.net, lesson.stage
        rows = max(1, args.batch_tokens // (stage.length - lesson.past))
        batch = self.feed.next(stage, rows, self.device)
        mode = Mode(self.dtype, lesson.topk, lesson.extra, index_loss=True, rounded=lesson.rounded)
        past = None
        if lesson.past:
            past = self._frozen_past(batch, lesson, mode)
            batch = Drawn(*(x[:, lesson.past :] for x in batch))
        net.ops = self.fused
        if lesson.topk is not None:
            mode.hinted = batch.hinted
        streams, run = net.streams(batch.ids, batch.positions, mode, past, lesson.past)
        following = batch.ids.roll(-1, 1)
        targets, weights = following.reshape(-1), batch.weights.reshape(-1)
        loss, best = weighted_loss(net, net.hidden(streams, net), targets, weights)
        index = torch.stack(run.index_losses).mean() if run.index_losses else loss.new_zeros(())
        draft = loss.new_zeros(())
        if args.draft:
            draft_streams, _ = net.draft_streams(streams, batch.ids, batch.positions, replace(mode, index_loss=False))
            later = weights.view_as(batch.ids).roll(-1, 1)
            later[:, -2:] = 0
            hidden = net.hidden(draft_streams, net.draft_block)
            draft, _ = weighted_loss(net, hidden, batch.ids.roll(-2, 1).reshape(-1), later.reshape(-1))
        (loss + args.index_weight * index + DRAFT_WEIGHT * draft).backward()
        norm = self.optimizer.step(self.factor())
        self._balance(run)
        answer = weights == 1.0
        seen = {"loss": loss.detach(), "index": index.detach(), "draft": draft.detach(), "norm": norm}
        seen["accuracy"] = exact_answers(best, targets, answer)
        text = (weights > 0) & ~answer
        seen["recall"] = torch.stack(run.recall).mean() if run.recall else loss.new_full((), -1.0)
        seen["top1_text"] = ((best == targets) & text).sum() / text.sum().clamp_min(1)
        return seen

    @torch.no_grad()
    def _frozen_past(self, batch: Drawn, lesson: Lesson, mode: Mode) -> list[Past] | None:
        """The state after the first `lesson.past` tokens."""
        self.net.ops = self.eager
        past: list[Past] | None = None
        chunk = 32768
        quiet = replace(mode, index_loss=False, keep=True)
        for low in range(0, lesson.past, chunk):
            part = slice(low, min(low + chunk, lesson.past))
            _, run = self.net.streams(batch.ids[:, part], batch.positions[:, part], quiet, past, low)
            past = run.past
        return past

    @torch.no_grad()
    def _balance(self, run: Run) -> None:
        """Move the routers' selection bias towards equal load, as V3 and V4 do instead of a balance loss."""
        for block, load in zip(self.net.layers, run.loads, strict=True):
            assert isinstance(block, Block)
            if not block.hashed:
                block.ffn.gate.bias += BALANCE_RATE * torch.sign(load.mean() - load)

    def run(self) -> None:
        """Train until the stretch or the total is over."""
        args, progress = self.args, self.progress
        end = min(progress.seconds + 60 * args.stretch, 60 * args.total)
        last, window, seen_tokens = time.monotonic(), [], 0
        lessons = [lesson for lesson in LESSONS if lesson.name[0] in args.lessons]
        while progress.seconds < end and (not args.steps or progress.step < args.steps):
            lesson = lessons[min(progress.lesson, len(lessons) - 1)]
            window.append(self.step(lesson))
            progress.step += 1
            progress.tokens += args.batch_tokens
            seen_tokens += args.batch_tokens
            if len(window) < args.log_every:
                continue
            values = {k: float(torch.stack([w[k] for w in window]).mean()) for k in window[0]}
            now = time.monotonic()
            progress.seconds += now - last
            progress.lesson_seconds += now - last
            progress.accuracy = values["accuracy"]
            self.log(step=progress.step, lesson=lesson.name, seconds=progress.seconds, tokens=progress.tokens,
                     rate=seen_tokens / (now - last), factor=self.factor(), **values)  # fmt: skip
            last, window, seen_tokens = now, [], 0
            self._advance(lessons)
        self.save()

    def _advance(self, lessons: list[Lesson]) -> None:
        """On to the next lesson if this one is learned or its time is up; far from learned, it gets more time."""
        progress = self.progress
        if progress.lesson >= len(lessons) - 1:
            return
        share = lessons[progress.lesson].share * 60 * self.args.total
        learned = progress.accuracy >= GOOD_ENOUGH and progress.lesson_seconds >= self.args.least * share
        patience = 1.0 if progress.accuracy > 0.5 else 1.8
        if learned or progress.lesson_seconds >= patience * share:
            progress.lesson += 1
            progress.lesson_seconds = 0.0
            self.save()

    def save(self) -> None:
        """Everything for `--resume`, and the weights alone in `--out`, in files of bounded size."""
        state = {"net": self.net.state_dict(), "optimizer": self.optimizer.state(), "progress": vars(self.progress)}
        torch.save(state, self.args.state / "state.pt")
        save_weights(self.net, self.args.out)

    def resume(self) -> None:
        """Continue from `--state`, if there is something."""
        path = self.args.state / "state.pt"
        if path.is_file():
            state = torch.load(path, map_location=self.device, weights_only=False)
            self.net.load_state_dict(state["net"])
            self.optimizer.load(state["optimizer"])
            vars(self.progress).update(state["progress"])


def save_weights(net: Net, out: Path, files: int = 4) -> None:
    """The net's parameters in float32 as weights-0.pt ..., dealt out so that the files are about equally large."""
    shares: list[dict[str, Tensor]] = [{} for _ in range(files)]
    sizes = [0] * files
    for name, value in sorted(net.state_dict().items(), key=lambda item: -item[1].numel()):
        i = sizes.index(min(sizes))
        shares[i][name] = value.detach().cpu()
        sizes[i] += value.numel() * value.element_size()
    for i, share in enumerate(shares):
        torch.save(share, out / f"weights-{i}.pt")


def report(trainer: Trainer, plan: list[tuple[int, int]]) -> None:
    """Measure retrieval and text loss on held-out text, as trained and as stored, into the log."""
    args, net = trainer.args, trainer.net
    net.ops = trainer.eager
    text = load_text(args.corpus, "held_out")
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    round_to_storage(net)
    mode = Mode(trainer.dtype, topk=net.shape.index_topk)
    trainer.log(event="text", stored=True, loss=text_loss(net, text, mode))
    for row in measure(net, text, plan, mode):
        trainer.log(event="retrieval", stored=True, **row)
    net.load_state_dict(kept)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stretch", type=float, default=9.0, help="minutes of training in this call")
    parser.add_argument("--total", type=float, default=19.0, help="minutes of training in all calls together")
    parser.add_argument("--steps", type=int, default=0, help="stop after this many steps (0: by time)")
    parser.add_argument("--lessons", default="ABCDE", help="which lessons, by letter")
    parser.add_argument(
        "--least", type=float, default=0.3, help="share of a lesson's time that is spent on it at least"
    )
    parser.add_argument("--decay", type=float, default=0.5, help="last share of the time over which rates fall")
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--matrix-rate", type=float, default=0.02)
    parser.add_argument("--other-rate", type=float, default=2e-3)
    parser.add_argument("--index-weight", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--draft", action=argparse.BooleanOptionalAction, default=True, help="train the MTP block too")
    parser.add_argument("--resume", action="store_true", help="go on from --state")
    parser.add_argument("--start", type=Path, help="folder of weights to start from, with a fresh optimizer")
    parser.add_argument("--measure", default="", help="measure afterwards: LENGTH:DOCUMENTS,...")
    return parser.parse_args()


def main() -> None:
    """Train one stretch and measure."""
    args = arguments()
    torch._dynamo.config.cache_size_limit = 64
    trainer = Trainer(args)
    if args.resume:
        trainer.resume()
    elif args.start:
        load_weights(trainer.net, args.start)
    parameters = sum(p.numel() for p in trainer.net.parameters())
    trainer.log(event="start", parameters=parameters, resumed_at=trainer.progress.seconds, torch=torch.__version__)
    trainer.run()
    trainer.feed.close()
    plan = [(int(a), int(b)) for a, b in (item.split(":") for item in args.measure.split(",") if item)]
    if plan:
        report(trainer, plan)


if __name__ == "__main__":
    main()
