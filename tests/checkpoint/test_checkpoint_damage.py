"""Whatever is wrong with a checkpoint: one sentence that names the tensor, the file, what was found and expected."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_files import EXPERT, SMALL, Tensors, damage, set_byte, write_small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from triptych.checkpoint import CheckpointReader, inspect_checkpoint, synthesize
from triptych.checkpoint.container import read_header
from triptych.checkpoint.reader import INDEX_FILE
from triptych.errors import CheckpointError, ConfigError

WQ_A = "layers.0.attn.wq_a.weight"
TABLE = "layers.0.ffn.gate.tid2eid"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One FP8 checkpoint of SMALL, never changed."""
    directory = tmp_path_factory.mktemp("pristine")
    write_small(directory)
    return directory


@pytest.fixture
def copy(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it to damage; returns the directory."""
    for path in pristine.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def weights_file(directory: Path) -> Path:
    """The only safetensors file."""
    [path] = directory.glob("*.safetensors")
    return path


def load(directory: Path) -> None:
    """Read everything."""
    for _ in CheckpointReader(directory).tensors():
        pass


def sentence(directory: Path) -> str:
    """What loading says."""
    with pytest.raises(CheckpointError) as caught:
        load(directory)
    message = str(caught.value)
    assert "\n" not in message and message.endswith((".", "?"))
    return message


def replaced(name: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    """A damage that puts `tensor` in place of `name`."""
    return lambda tensors: tensors.update({name: tensor})


def removed(name: str) -> Callable[[Tensors], object]:
    """A damage that takes `name` away."""
    return lambda tensors: tensors.pop(name)


def poked(name: str, value: float) -> Callable[[Tensors], object]:
    """A damage that puts `value` into the middle of `name`."""
    return lambda tensors: tensors[name].view(-1)[len(tensors[name]) // 2 : len(tensors[name]) // 2 + 1].fill_(value)


SCALE = "layers.0.attn.wq_a.scale"
HEADER_DAMAGE = [
    (removed(WQ_A), f"Tensor {WQ_A} [40, 160] is in none of the 1 files"),
    (removed("layers.1.attn.compressor.ape"), "Tensor layers.1.attn.compressor.ape [4, 100] is in none"),
    (removed("mtp.0.e_proj.weight"), "set num_nextn_predict_layers to 0"),
    (removed(SCALE), f"Tensor {WQ_A} in %s is F8_E4M3 and needs scales {SCALE} [1, 2]."),
    (replaced("norm.weight", torch.ones(161)), "Tensor norm.weight in %s is F32 [161], expected [160]"),
    (replaced("head.weight", torch.ones(16, 13)), "Tensor head.weight in %s is F32 [16, 13], expected [130, 160]"),
    (replaced(EXPERT, torch.zeros(96, 160).char()), f"Tensor {EXPERT} in %s is I8 [96, 160], expected [96, 80]"),
    (replaced("norm.weight", torch.ones(160).double()), "is F64, expected F32, BF16 or F16."),
    (replaced("norm.weight", torch.ones(160).to(torch.float8_e4m3fn)), "is F8_E4M3, expected F32, BF16 or F16."),
    (replaced(WQ_A, torch.ones(40, 160).char()), "is I8, expected F32, BF16 or F16, or F8_E4M3 with scales."),
    (replaced(TABLE, torch.ones(130, 2)), f"Tensor {TABLE} in %s is F32, expected I64 or I32."),
    (replaced(SCALE, torch.ones(2, 2)), f"Tensor {SCALE} in %s is F32 [2, 2], expected [1, 2]."),
    (replaced(SCALE, torch.ones(1, 2).long()), f"Tensor {SCALE} in %s is I64, expected F8_E8M0."),
    (replaced(WQ_A, torch.ones(40, 160)), f"Tensor {SCALE} in %s scales {WQ_A}, which is F32."),
    (replaced("layers.1.attn.wq_aa.weight", torch.ones(2)), "model. Did you mean 'layers.1.attn.wq_a.weight'?"),
    (replaced("layers.9.attn.wkv.weight", torch.ones(2)), "Tensor layers.9.attn.wkv.weight in %s is not part of"),
    (replaced("model.embed_tokens.weight", torch.ones(130, 160)), "Tensor embed.weight comes twice: as "),
    (replaced("layers.0.mlp.experts.down_proj", torch.ones(2, 4, 4)), "[2, 4, 4], expected a stack of 3 experts."),
]


@pytest.mark.parametrize(("change", "expected"), HEADER_DAMAGE, ids=[e for _, e in HEADER_DAMAGE])
def test_headers_that_do_not_fit(copy: Path, change: Callable[[Tensors], object], expected: str) -> None:
    path = weights_file(copy)
    damage(path, change)
    expected = expected.replace("%s", str(path))
    assert expected in sentence(copy)
    assert any(expected in problem for problem in inspect_checkpoint(copy).problems)


MX_SCALE = EXPERT.replace("weight", "scale")
VALUE_DAMAGE = [
    (poked("head.weight", float("nan")), "Tensor head.weight in %s holds 1 values that are NaN or infinite."),
    (poked("embed.weight", float("-inf")), "Tensor embed.weight in %s holds 1 values that are NaN or infinite."),
    (poked("layers.0.attn.attn_sink", float("inf")), "Tensor layers.0.attn.attn_sink in %s holds 1 values"),
    (poked("layers.2.hc_ffn_fn", float("nan")), "Tensor layers.2.hc_ffn_fn in %s holds 1 values"),
    (lambda t: set_byte(t[WQ_A], 0x7F), f"Tensor {WQ_A} in %s holds 1 values that are NaN or infinite."),
    (lambda t: set_byte(t[SCALE], 255), f"Tensor {SCALE} in %s holds a NaN scale at [0, 0]."),
    (lambda t: set_byte(t[MX_SCALE], 255), f"Tensor {MX_SCALE} in %s holds a NaN scale at [0, 0]."),
    (poked(TABLE, 3), f"Tensor {TABLE} in %s sends token 32 to expert 3, expected 0 to 2."),
    (poked(TABLE, -1), "to expert -1, expected 0 to 2."),
]


@pytest.mark.parametrize(("change", "expected"), VALUE_DAMAGE, ids=[e for _, e in VALUE_DAMAGE])
def test_values_that_cannot_be_weights(copy: Path, change: Callable[[Tensors], object], expected: str) -> None:
    path = weights_file(copy)
    damage(path, change)
    expected = expected.replace("%s", str(path))
    assert expected in sentence(copy)
    assert inspect_checkpoint(copy).problems == ()
    [problem] = inspect_checkpoint(copy, values=True).problems
    assert expected in problem


def test_inspection_collects_everything(copy: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors.pop(WQ_A)
        tensors["norm.weight"] = torch.ones(3)
        tensors["extra"] = torch.ones(3)
        tensors["head.weight"].view(-1)[0] = float("nan")

    damage(weights_file(copy), change)
    report = inspect_checkpoint(copy, values=True)
    for part in (WQ_A, "norm.weight", "extra", "head.weight"):
        assert sum(f"Tensor {part} " in problem for problem in report.problems) == 1
    assert len(report.problems) == 4


# -- files


def test_truncated_files(copy: Path) -> None:
    path = weights_file(copy)
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for size, expected in (
        (0, f"{path} is no safetensors file, or cut off inside its header."),
        (7, "cut off inside its header"),
        (header - 1, "cut off inside its header"),
        (header, f"{path} is truncated: tensor "),
        (len(whole) - 1, f"{path} is truncated: tensor "),
    ):
        path.write_bytes(whole[:size])
        assert expected in sentence(copy)
    path.write_bytes(whole + b"x")
    assert "has 1 bytes behind its last tensor" in sentence(copy)


def write_raw(path: Path, header: object, data: bytes = b"") -> None:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b"not json", "its header is not JSON"),
        (b"\xff\xfe\xfd", "its header is not JSON"),
        ([], "its header is no JSON object"),
        ({"t": 1}, "describes tensor t by '1'"),
        ({"t": {"dtype": "F32", "shape": [1]}}, "describes tensor t by"),
        ({"t": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "describes tensor t by"),
        ({"t": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, "describes tensor t by"),
        ({"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, "describes tensor t by"),
        ({"t": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}}, "has the unknown dtype 'F3'"),
        ({"t": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}, "describes tensor t by"),
        ({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "8 bytes, but its header gives it 4."),
        ({"t": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "expected"),
    ],
)  # fmt: skip
def test_headers_that_are_none(copy: Path, header: object, expected: str) -> None:
    write_raw(weights_file(copy), header, b"\0" * 8)
    assert expected in sentence(copy)


def test_overlapping_tensors(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    write_raw(tmp_path / "x.safetensors", {"a": entry, "b": entry}, b"\0" * 8)
    with pytest.raises(CheckpointError, match=r"Tensor b in .* starts at byte"):
        read_header(tmp_path / "x.safetensors")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(at=st.integers(0, 2000), byte=st.integers(0, 255))
def test_any_flipped_header_byte_is_harmless_or_named(pristine: Path, tmp_path: Path, at: int, byte: int) -> None:
    """Never a traceback: the header parses to the same table, or there is a CheckpointError."""
    data = bytearray(weights_file(pristine).read_bytes())
    data[at] = byte
    path = tmp_path / "flipped.safetensors"
    path.write_bytes(data)
    try:
        read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)


def test_a_file_that_shrinks_while_it_is_read(copy: Path) -> None:
    reader = CheckpointReader(copy)
    path = weights_file(copy)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="became shorter while tensor"):
        list(reader.tensors())


# -- directories and indexes


def test_directories_that_hold_no_checkpoint(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no config\.json in .*nowhere"):
        CheckpointReader(tmp_path / "nowhere")
    weights_file(copy).unlink()
    assert f"There is no safetensors file in {copy}" in sentence(copy)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of several shards with an index."""
    synthesize(tmp_path, SMALL, max_shard_bytes=300_000)
    return tmp_path


def test_a_missing_shard_is_one_problem(sharded: Path) -> None:
    missing = sorted(sharded.glob("*.safetensors"))[1]
    lost = list(load_file(missing))
    missing.unlink()
    message = sentence(sharded)
    assert f"in {missing}, but there is no such file. Fetch the missing shard." in message
    assert any(f"The index puts tensor {name} in" in message for name in lost)
    assert list(inspect_checkpoint(sharded).problems) == [message], "not one for each tensor in it"


def test_a_tensor_that_is_not_where_the_index_says(sharded: Path) -> None:
    path = sorted(sharded.glob("*.safetensors"))[-1]
    tensors = load_file(path)
    name = next(iter(tensors))
    del tensors[name]
    save_file(tensors, path)
    assert f"Tensor {name} " in sentence(sharded) and f"is not in {path.name}, where the index puts it" in sentence(
        sharded
    )


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../b"}}'])
def test_indexes_that_are_none(sharded: Path, content: str) -> None:
    (sharded / INDEX_FILE).write_text(content)
    assert sentence(sharded) == f"{sharded / INDEX_FILE} is no index of safetensors files: it has no usable weight_map."


def test_a_config_of_another_shape(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 131}))
    assert "Tensor embed.weight in" in sentence(copy) and "[131, 160]" in sentence(copy)
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"weight_block_size": [32, 32]}}))
    assert "weight_block_size [32, 32], but DeepSeek-V4 has [128, 128]" in sentence(copy)
