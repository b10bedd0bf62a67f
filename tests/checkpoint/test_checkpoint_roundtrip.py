"""What is written is read back: every dialect, every format, any sharding, bit for bit where the format allows."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import EXPERT, SMALL, Tensors, damage, one_file, write_small
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from triptych.checkpoint import (
    CheckpointReader,
    random_tensors,
    stored_bytes,
    synthesize,
    tensor_table,
    write_checkpoint,
)
from triptych.checkpoint.reader import INDEX_FILE
from triptych.errors import CheckpointError, ConfigError
from triptych.kernels.quant import ref as quant

TABLE = tensor_table(SMALL)
DIALECTS = ["official", "transformers"]


def original(mtp: bool = True, seed: int = 0) -> Tensors:
    """The values that `synthesize` starts from."""
    return {name: t for name, t in random_tensors(SMALL, seed) if mtp or not name.startswith("mtp.")}


def rounded(name: str, tensor: Tensor, weights: str) -> Tensor:
    """What a format keeps of a value."""
    kind = TABLE[name].kind
    if kind in ("ids", "float32") or weights == "fp32":
        return tensor
    if weights == "fp8" and kind == "linear":
        return quant.dequantize_fp8(*quant.quantize_fp8(tensor))
    if weights == "fp8" and kind == "expert":
        return quant.fake_quant_fp4(tensor)
    return tensor.bfloat16().float()


@pytest.mark.parametrize("shard", [1, 20_000, 1 << 30])
@pytest.mark.parametrize("weights", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_values_come_back(tmp_path: Path, dialect: Any, weights: Any, shard: int) -> None:
    synthesize(tmp_path, SMALL, dialect=dialect, weights=weights, seed=4, max_shard_bytes=shard)
    reader = CheckpointReader(tmp_path)
    assert reader.shape == SMALL
    assert (len(reader.files) == 1) == (shard == 1 << 30)
    loaded = dict(reader.tensors())
    expected = original(mtp=dialect == "official", seed=4)
    assert loaded.keys() == expected.keys() and reader.has_mtp == (dialect == "official")
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], rounded(name, tensor, weights)), name


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_bf16_twin_of_an_fp8_checkpoint_is_equal(tmp_path: Path, dialect: Any) -> None:
    synthesize(tmp_path / "fp8", SMALL, weights="fp8", seed=2)
    source = CheckpointReader(tmp_path / "fp8")
    write_checkpoint(tmp_path / "twin", SMALL, source.tensors(), weights="bf16", dialect=dialect)
    twin = dict(CheckpointReader(tmp_path / "twin").tensors())
    for name, tensor in source.tensors(mtp=dialect == "official"):
        assert torch.equal(twin[name], tensor), name


def test_requantising_changes_nothing(tmp_path: Path) -> None:
    synthesize(tmp_path / "a", SMALL, weights="fp8", seed=2)
    source = CheckpointReader(tmp_path / "a")
    write_checkpoint(tmp_path / "b", SMALL, source.tensors(), weights="fp8")
    again = dict(CheckpointReader(tmp_path / "b").tensors())
    assert all(torch.equal(again[name], tensor) for name, tensor in source.tensors())


def test_tensors_may_come_in_any_order(tmp_path: Path) -> None:
    pairs = list(random_tensors(SMALL, 0))
    random.Random(0).shuffle(pairs)
    write_checkpoint(tmp_path, SMALL, pairs, weights="fp32", dialect="transformers", max_shard_bytes=30_000)
    loaded = dict(CheckpointReader(tmp_path).tensors())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in original(mtp=False).items())


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synthesize(tmp_path / name, SMALL, weights="fp8", seed=seed)
    a, b, c = (one_file(tmp_path / name).read_bytes() for name in "abc")
    assert a == b and a != c


def test_official_fp8_files_look_like_the_released_ones(tmp_path: Path) -> None:
    """Dtypes and shapes of reference section 5.1, as an independent library reads them."""
    path = write_small(tmp_path)
    expected = {
        "embed.weight": ("BF16", [130, 160]),
        "hc_head_fn": ("F32", [4, 640]),
        "norm.weight": ("BF16", [160]),
        "layers.1.attn.wq_b.weight": ("F8_E4M3", [200, 40]),
        "layers.1.attn.wq_b.scale": ("F8_E8M0", [2, 1]),
        "layers.1.attn.indexer.wq_b.scale": ("F8_E8M0", [1, 1]),
        "layers.1.attn.indexer.weights_proj.weight": ("BF16", [3, 160]),
        "layers.1.attn.compressor.ape": ("F32", [4, 100]),
        "layers.1.attn.attn_sink": ("F32", [4]),
        "layers.0.ffn.gate.tid2eid": ("I64", [130, 2]),
        "layers.1.ffn.gate.bias": ("F32", [3]),
        "layers.1.ffn.gate.weight": ("BF16", [3, 160]),
        EXPERT: ("I8", [96, 80]),
        "layers.1.ffn.experts.2.w1.scale": ("F8_E8M0", [96, 5]),
        "layers.1.ffn.shared_experts.w2.scale": ("F8_E8M0", [2, 1]),
        "mtp.0.h_proj.weight": ("F8_E4M3", [160, 160]),
    }
    with safe_open(path, "pt") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        scales = [name for name in found if name.endswith(".scale")]
        assert found.keys() - set(scales) == TABLE.keys()
        assert {name: (found[name].get_dtype(), found[name].get_shape()) for name in expected} == expected
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["expert_dtype"] == "fp4" and config["torch_dtype"] == "bfloat16"
    assert config["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "scale_fmt": "ue8m0",
    }


@pytest.mark.parametrize("weights", ["fp32", "bf16", "fp8"])
def test_the_index_and_the_formula_count_the_same_bytes(tmp_path: Path, weights: Any) -> None:
    synthesize(tmp_path, SMALL, weights=weights, max_shard_bytes=50_000)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == stored_bytes(TABLE.values(), weights)
    reader = CheckpointReader(tmp_path)
    assert sum(source.nbytes for source in reader.sources.values()) == index["metadata"]["total_size"]
    assert set(index["weight_map"].values()) == {file.name for file in reader.files}


def test_the_requested_dtype_is_for_matrices_only(tmp_path: Path) -> None:
    synthesize(tmp_path, SMALL, weights="fp32")
    reader = CheckpointReader(tmp_path)
    for name, tensor in reader.tensors(torch.bfloat16):
        kind = TABLE[name].kind
        exact = torch.int64 if kind == "ids" else torch.float32
        assert tensor.dtype == (torch.bfloat16 if kind in ("linear", "expert", "matrix") else exact), name
    assert not any(name.startswith("mtp.") for name, _ in reader.tensors(mtp=False))


def test_raw_tensors_are_the_stored_bytes(tmp_path: Path) -> None:
    path = write_small(tmp_path)
    stored = load_file(path)
    raw = {item.spec.name: item for item in CheckpointReader(tmp_path).raw_tensors()}
    assert raw.keys() == TABLE.keys()
    for name, item in raw.items():
        assert item.data.dtype == stored[name].dtype
        assert torch.equal(item.data.view(torch.uint8), stored[name].view(torch.uint8))
        scale = stored.get(item.spec.scale_name or "")
        assert (item.scale is None) == (scale is None)
        if scale is not None and item.scale is not None:
            assert torch.equal(item.scale, scale.view(torch.uint8))


# -- formats that other exporters write


def unpack_int8(tensors: Tensors) -> None:
    """Packed experts as unsigned bytes, and their scales too."""
    for name in [n for n in tensors if ".experts." in n]:
        tensors[name] = tensors[name].view(torch.uint8)


def narrow_ids(tensors: Tensors) -> None:
    """The routing table as the reference code keeps it."""
    tensors["layers.0.ffn.gate.tid2eid"] = tensors["layers.0.ffn.gate.tid2eid"].int()


def plain_scales(tensors: Tensors) -> None:
    """Float32 scales of FP8 matrices, as in the -Base releases."""
    for name in [n for n in tensors if n.endswith(".scale") and ".experts." not in n]:
        tensors[name] = tensors[name].float()


@pytest.mark.parametrize("change", [unpack_int8, narrow_ids, plain_scales])
def test_other_storage_of_the_same_values(tmp_path: Path, change: Any) -> None:
    path = write_small(tmp_path)
    before = dict(CheckpointReader(tmp_path).tensors())
    damage(path, change)
    after = dict(CheckpointReader(tmp_path).tensors())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_fp8_experts_with_float32_scales(tmp_path: Path) -> None:
    """The -Base releases, also stacked as Transformers does."""
    shape = replace(SMALL, moe_intermediate_size=128)
    synthesize(tmp_path, shape, weights="fp32", dialect="transformers")
    before = dict(CheckpointReader(tmp_path).tensors())
    expected: Tensors = {}

    def quantise(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith("experts.gate_up_proj")]:
            pairs = [quant.quantize_fp8(matrix) for matrix in tensors[name]]
            tensors[name] = torch.stack([data for data, _ in pairs])
            tensors[name + "_scale_inv"] = torch.stack([quant.e8m0_decode(codes) * 1.5 for _, codes in pairs])
        for name in [n for n in before if n.endswith((".w1.weight", ".w3.weight")) and ".experts." in n]:
            data, codes = quant.quantize_fp8(before[name])
            expected[name] = quant.dequantize_fp8(data, quant.e8m0_decode(codes) * 1.5)

    damage(one_file(tmp_path), quantise)
    after = dict(CheckpointReader(tmp_path).tensors())
    assert expected
    for name, tensor in before.items():
        assert torch.equal(after[name], expected.get(name, tensor)), name


def test_half_precision_and_scalars_pass(tmp_path: Path) -> None:
    path = write_small(tmp_path, "bf16")
    before = dict(CheckpointReader(tmp_path).tensors())
    damage(path, lambda t: t.update({"head.weight": t["head.weight"].half()}))
    after = dict(CheckpointReader(tmp_path).tensors())
    assert torch.equal(after["head.weight"], before["head.weight"].half().float())


def test_copies_under_the_mtp_block_are_ignored(tmp_path: Path) -> None:
    path = write_small(tmp_path)
    damage(path, lambda t: t.update({"mtp.0.emb.tok_emb.weight": torch.ones(2), "mtp.0.head.weight": torch.ones(2)}))
    assert dict(CheckpointReader(tmp_path).tensors()).keys() == TABLE.keys()


def test_shards_without_an_index_are_all_read(tmp_path: Path) -> None:
    synthesize(tmp_path, SMALL, max_shard_bytes=100_000)
    (tmp_path / INDEX_FILE).unlink()
    reader = CheckpointReader(tmp_path)
    assert len(reader.files) > 3 and reader.sources.keys() == TABLE.keys()


# -- what the writer refuses


def test_the_writer_checks_what_it_is_given(tmp_path: Path) -> None:
    tensors = original()
    cases = (
        (
            [*tensors.items(), ("layers.0.attn.wq_c.weight", torch.ones(1))],
            "wq_c.weight is not part of this shape.",
        ),
        ([*tensors.items(), ("norm.weight", torch.ones(160))], "norm.weight was given twice."),
        ([("norm.weight", torch.ones(161))], r"norm.weight is \[161\], expected \[160\]."),
        (list(tensors.items())[:-3], "mtp.0.hc_head_fn is missing, and 2 more."),
    )
    for number, (pairs, sentence) in enumerate(cases):
        directory = tmp_path / str(number)
        with pytest.raises(CheckpointError, match=sentence):
            write_checkpoint(directory, SMALL, pairs, max_shard_bytes=50_000)
        assert list(directory.iterdir()) == [], "nothing half-written stays"


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> Iterator[tuple[str, Tensor]]:
        yield from list(random_tensors(SMALL, 0))[:60]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, SMALL, interrupted(), max_shard_bytes=50_000)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files fails as a full disk does: in the middle of a shard."""
    code = f"""
import resource, signal
from triptych.checkpoint.writer import synthesize
from triptych.config import ModelShape
from triptych.errors import ConfigError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try:
    synthesize({str(tmp_path)!r}, ModelShape.from_dict({SMALL.to_dict()!r}), max_shard_bytes=80_000)
except ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "cannot be written" in done.stdout and "File too large" in done.stdout, done.stderr
    assert "None of it is kept." in done.stdout and list(tmp_path.iterdir()) == []


def test_an_older_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    synthesize(tmp_path, SMALL)
    before = one_file(tmp_path).read_bytes()
    with pytest.raises(ConfigError, match="holds a checkpoint already"):
        synthesize(tmp_path, SMALL, seed=1)
    assert one_file(tmp_path).read_bytes() == before


def test_sizes_that_mxfp4_cannot_hold_are_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="moe_intermediate_size 48 is no multiple of 32"):
        synthesize(tmp_path / "new", replace(SMALL, moe_intermediate_size=48), weights="fp8")
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_comes_along(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{}")
    synthesize(tmp_path / "new", SMALL, tokenizer=tmp_path / "t.json")
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "{}"


def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    synthesize(tmp_path, SMALL)
    assert one_file(tmp_path).stat().st_mode == (tmp_path / "config.json").stat().st_mode
