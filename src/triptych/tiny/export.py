"""From the training net to a checkpoint in the official layout (reference section 5.1), and back.

python -m triptych.tiny.export --weights FOLDER --out FOLDER [--format fp8|bf16]
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from triptych.tiny.net import Net
from triptych.tiny.rounding import e2m1_groups, e4m3_blocks
from triptych.tiny.shape import TINY_SHAPE, TOKENIZER_FILE

_FP8 = re.compile(r"(attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|shared_experts\.w[123]|[eh]_proj)\.weight$")
_FP4 = re.compile(r"ffn\.experts\.\d+\.w[123]\.weight$")
_FP32 = re.compile(r"(hc_\w+|ape|attn_sink|gate\.bias)$")


def official_tensors(net: Net) -> Iterator[tuple[str, Tensor]]:
    """(official name, logical values) of every tensor of `net`, float32 except the int64 hash table."""
    for name, value in net.state_dict().items():
        name = name.replace("mtp.0.block.", "mtp.0.")
        match = re.fullmatch(r"(.*\.ffn)\.(w[123])", name)
        if match is None:
            yield name, value
            continue
        prefix, part = match.groups()
        for expert in range(value.shape[0] - 1):
            yield f"{prefix}.experts.{expert}.{part}.weight", value[expert]
        yield f"{prefix}.shared_experts.{part}.weight", value[-1]


def load_official(net: Net, tensors: Mapping[str, Tensor]) -> None:
    """Set the parameters of `net` from official tensors of logical values; KeyError names a missing one."""
    state = {}
    for name, value in net.state_dict().items():
        official = name.replace("mtp.0.block.", "mtp.0.")
        match = re.fullmatch(r"(.*\.ffn)\.(w[123])", official)
        if match is None:
            state[name] = tensors[official]
            continue
        prefix, part = match.groups()
        parts = [tensors[f"{prefix}.experts.{e}.{part}.weight"] for e in range(value.shape[0] - 1)]
        state[name] = torch.stack([*parts, tensors[f"{prefix}.shared_experts.{part}.weight"]])
    net.load_state_dict(state)


def stored(name: str, value: Tensor) -> Tensor:
    """`value` as the checkpoint will hold it: FP8 linears, MXFP4 experts, float32 mHC, bfloat16 for the rest."""
    if _FP8.search(name):
        return e4m3_blocks(value)
    if _FP4.search(name):
        return e2m1_groups(value)
    if _FP32.search(name) or not value.is_floating_point():
        return value
    return value.to(torch.bfloat16).float()


def round_to_storage(net: Net) -> None:
    """Replace every weight of `net` by what the checkpoint will hold, so that a measurement sees the shipped model."""
    load_official(net, {name: stored(name, value) for name, value in official_tensors(net)})


def load_weights(net: Net, folder: Path) -> None:
    """Set the parameters from the files that training wrote."""
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("weights-*.pt")):
        state |= torch.load(path, map_location="cpu", weights_only=True)
    net.load_state_dict(state)


def main() -> None:
    """Write the checkpoint."""
    from triptych.checkpoint import write_checkpoint

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder with weights-*.pt")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--format", choices=("fp8", "bf16"), default="fp8")
    args = parser.parse_args()
    net = Net(TINY_SHAPE)
    load_weights(net, args.weights)
    with torch.no_grad():
        write_checkpoint(args.out, TINY_SHAPE, official_tensors(net), weights=args.format, tokenizer=TOKENIZER_FILE)


if __name__ == "__main__":
    main()
