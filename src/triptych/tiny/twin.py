"""What compression costs in text quality: the tiny model against its twin with full attention, on the same tokens.

    python -m triptych.tiny.twin --corpus corpus.npz --out rows.jsonl --weights FOLDER --steps 150

Both start from one seed and see the same batches of plain text with the same rates. The twin has the same layers, but
CSA and HCA layers attend to every earlier row instead of a window and compressed entries.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from triptych.tiny import attention as at
from triptych.tiny.data import load_text
from triptych.tiny.export import load_weights, round_to_storage
from triptych.tiny.measure import measure, text_loss
from triptych.tiny.net import Block, Front, Mode, Net, Rows, Run
from triptych.tiny.ops import Ops
from triptych.tiny.optim import Optimizer
from triptych.tiny.shape import TINY_SHAPE
from triptych.tiny.train import weighted_loss

LENGTH = 4096


class DenseTwin(Net):
    """The same model with full attention where the original compresses."""

    def _with_entries(
        self, block: Block, front: Front, rows: Rows, mode: Mode, run: Run, past: at.Past | None
    ) -> Tensor:
        """Causal attention over all rows [B, S, H, c], without a sink."""
        kv = front.window[:, -rows.length :].unsqueeze(1).expand(-1, self.shape.num_heads, -1, -1).contiguous()
        q = front.q.transpose(1, 2).contiguous()
        return F.scaled_dot_product_attention(q, kv, kv, is_causal=True).transpose(1, 2)


def train_on_text(net: Net, text: np.ndarray[Any, Any], steps: int, rows: int, dtype: torch.dtype) -> float:
    """`steps` updates on random spans of `text`, the same for every net; returns the seconds."""
    rng, device = np.random.default_rng(5), net.embed.weight.device
    optimizer = Optimizer(net, matrix_rate=0.02, other_rate=2e-3)
    positions = torch.arange(LENGTH, device=device).expand(rows, -1)
    begun = time.monotonic()
    for step in range(steps):
        starts = rng.integers(0, len(text) - LENGTH - 1, rows)
        spans = torch.from_numpy(np.stack([text[s : s + LENGTH + 1] for s in starts]).astype(np.int64)).to(device)
        # the indexer watches full attention first, as in the real training
        mode = Mode(dtype, None if step < steps // 2 else 128, 64, index_loss=True)
        streams, run = net.streams(spans[:, :-1], positions, mode)
        targets = spans[:, 1:].reshape(-1)
        loss, _ = weighted_loss(net, net.hidden(streams, net), targets, torch.ones_like(targets, dtype=torch.float32))
        index = torch.stack(run.index_losses).mean() if run.index_losses else loss.new_zeros(())
        (loss + index).backward()
        for p in net.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # parts that this net does not use
        done = step / steps
        optimizer.step(min(1.0, (step + 1) / 30) * min(1.0, 2 * (1 - done) + 0.02))
    return time.monotonic() - begun


def main() -> None:
    """Measure the checkpoint, then train and compare the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are appended here")
    parser.add_argument("--weights", type=Path, help="folder of weights to measure first, as stored")
    parser.add_argument("--measure", default="", help="LENGTH:DOCUMENTS,...")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=16, help="spans of 4096 tokens a step")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 64
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    held_out = load_text(args.corpus, "held_out")

    def write(**row: Any) -> None:
        line = json.dumps(row)
        with args.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    if args.weights:
        net = Net(TINY_SHAPE).to(args.device)
        load_weights(net, args.weights)
        round_to_storage(net)
        net.ops = Ops(False, scoring=args.compile)
        plan = [(int(a), int(b)) for a, b in (item.split(":") for item in args.measure.split(",") if item)]
        for row in measure(net, held_out, plan, Mode(dtype, topk=net.shape.index_topk), seed=2000):
            write(event="retrieval", stored=True, **row)
        del net
    text = load_text(args.corpus)
    for name, kind in (("tiny", Net), ("dense twin", DenseTwin)) if args.steps else ():
        torch.manual_seed(3)
        net = kind(TINY_SHAPE).to(args.device)
        net.ops = Ops(args.compile, scoring=args.compile)
        seconds = train_on_text(net, text, args.steps, args.rows, dtype)
        net.ops = Ops(False, scoring=args.compile)
        loss = text_loss(net, held_out, Mode(dtype, topk=128), LENGTH)
        unused = ("compressor", "indexer") if kind is DenseTwin else ()
        size = sum(p.numel() for n, p in net.named_parameters() if not n.startswith("mtp.")
                   and not any(u in n for u in unused))  # fmt: skip
        write(event="twin", name=name, parameters=size, tokens=args.steps * args.rows * LENGTH, loss=loss,
              seconds=seconds)  # fmt: skip


if __name__ == "__main__":
    main()
