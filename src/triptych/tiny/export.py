"""Between the training net and the official tensor names (reference section 5.1), one expert at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from triptych.tiny.net import Net
from triptych.tiny.rounding import e2m1_groups, e4m3_blocks

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
