"""Random weights keep a deep model alive, and every part of it different from doing nothing."""

from __future__ import annotations

from dataclasses import replace

import torch
from checkpoint_files import SMALL

from triptych.checkpoint import random_tensors, tensor_table
from triptych.kernels.mhc.ref import sinkhorn

SHAPE = replace(SMALL, vocab_size=400, num_experts=7, experts_per_token=3)
TABLE = tensor_table(SHAPE)
TENSORS = dict(random_tensors(SHAPE, 11))


def test_every_tensor_once_in_its_shape() -> None:
    assert TENSORS.keys() == TABLE.keys()
    for name, tensor in TENSORS.items():
        assert tuple(tensor.shape) == TABLE[name].shape
        assert tensor.dtype == (torch.int64 if TABLE[name].kind == "ids" else torch.float32)


def test_values_depend_on_seed_and_name_only() -> None:
    again = dict(random_tensors(SHAPE, 11))
    other = dict(random_tensors(SHAPE, 12))
    fewer = dict(random_tensors(replace(SHAPE, ratios=(0, 4), num_mtp_layers=0), 11))
    for name, tensor in TENSORS.items():
        assert torch.equal(again[name], tensor) and not torch.equal(other[name], tensor), name
        assert name not in fewer or torch.equal(fewer[name], tensor), name
    flat = [tensor.flatten()[:2].tolist() for tensor in TENSORS.values() if tensor.is_floating_point()]
    assert len({tuple(head) for head in flat}) == len(flat), "no two tensors are drawn alike"


def test_a_product_keeps_the_size_of_its_input() -> None:
    for name, tensor in TENSORS.items():
        if TABLE[name].kind in ("linear", "expert", "matrix", "router") and name != "embed.weight":
            assert abs(tensor.square().sum(-1).mean() - 1) < 0.3, name
    assert abs(TENSORS["embed.weight"].std() - 1) < 0.1


def test_norms_are_near_one_and_nothing_is_trivial() -> None:
    for name, tensor in TENSORS.items():
        if TABLE[name].kind == "norm":
            assert 0.05 < (tensor - 1).std() < 0.2 and (tensor > 0).all(), name
        elif TABLE[name].kind == "float32":
            assert tensor.abs().max() > 0.05 and tensor.isfinite().all(), name


def test_each_token_has_distinct_experts() -> None:
    table = TENSORS["layers.0.ffn.gate.tid2eid"]
    assert table.min() == 0 and table.max() == SHAPE.num_experts - 1
    assert all(len(set(row)) == SHAPE.experts_per_token for row in table.tolist())
    counts = torch.bincount(table.flatten(), minlength=SHAPE.num_experts)
    assert counts.min() > 0.7 * counts.float().mean(), "all experts are used about alike"


def test_residual_maps_are_far_from_uniform() -> None:
    """A model whose maps were all 1/4 would hide a transposed one."""
    n = SHAPE.hc_mult
    rows = torch.randn(50, n * SHAPE.hidden_size, generator=torch.Generator().manual_seed(0))
    for layer in range(SHAPE.num_layers):
        for kind in ("attn", "ffn"):
            fn, base, scale = (TENSORS[f"layers.{layer}.hc_{kind}_{part}"] for part in ("fn", "base", "scale"))
            z = rows @ fn.T
            post = 2 * torch.sigmoid(z[:, n : 2 * n] * scale[1] + base[n : 2 * n])
            logits = (z[:, 2 * n :] * scale[2] + base[2 * n :]).view(-1, n, n)
            comb = sinkhorn(logits, SHAPE.hc_sinkhorn_iters, SHAPE.hc_eps)
            assert (comb - 0.25).abs().mean() > 0.05
            assert (comb - comb.transpose(-1, -2)).abs().mean() > 0.02
            assert comb.std(0).mean() > 0.02 and post.std() > 0.1, "and they differ from token to token"
