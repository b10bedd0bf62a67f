"""What `checkpoint inspect` and `synthesize` say and write, from the command line down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_files import SMALL, damage, write_small

from triptych.checkpoint import CheckpointReader, inspect_checkpoint, stored_bytes, tensor_table
from triptych.checkpoint.inspect import PARTS
from triptych.checkpoint.sizes import active_parameters, backbone, parameters
from triptych.cli.checkpoint import PROBLEMS_SHOWN
from triptych.cli.main import main
from triptych.tiny import TINY_SHAPE, TOKENIZER_FILE

Output = pytest.CaptureFixture[str]


def test_a_report_counts_what_is_there(tmp_path: Path) -> None:
    path = write_small(tmp_path)
    report = inspect_checkpoint(tmp_path)
    specs = list(tensor_table(SMALL).values())
    assert report.problems == () and report.files == 1 and report.has_mtp and report.dialect == "official"
    assert report.layers == {"swa": 1, "csa": 1, "hca": 1, "hash_routed": 1, "mtp": 1}
    assert report.parameters == parameters(backbone(SMALL))
    assert report.active_parameters == active_parameters(SMALL, backbone(SMALL))
    assert report.bytes == stored_bytes(specs, "fp8") < path.stat().st_size
    for totals in (report.parts, report.formats):
        assert sum(total.bytes for total in totals.values()) == report.bytes
        assert sum(total.tensors for total in totals.values()) == len(specs)
        assert sum(total.parameters for total in totals.values()) == parameters(specs)
    assert set(report.parts) == set(PARTS)
    for part, total in report.parts.items():
        assert total.bytes == stored_bytes([spec for spec in specs if spec.part == part], "fp8")
    experts = [spec for spec in specs if spec.kind == "expert"]
    assert report.formats["mxfp4"].bytes == stored_bytes(experts, "fp8")
    assert set(report.formats) == {"bfloat16", "float32", "fp8", "mxfp4", "int64"}


def test_a_transformers_checkpoint_has_no_mtp(tmp_path: Path) -> None:
    write_small(tmp_path, "bf16", "transformers")
    report = inspect_checkpoint(tmp_path)
    assert report.problems == () and report.dialect == "transformers"
    assert not report.has_mtp and report.layers["mtp"] == 0 and "mtp" not in report.parts


def test_inspect_prints_tables(tmp_path: Path, capsys: Output) -> None:
    write_small(tmp_path)
    assert main(["checkpoint", "inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    report = inspect_checkpoint(tmp_path)
    assert "3: 1 SWA, 1 CSA, 1 HCA, 1 routed by token id, 1 MTP" in out
    for name, total in (report.parts | report.formats).items():
        assert any(line.split()[:4] == [name, f"{total.tensors:,}", f"{total.parameters:,}", f"{total.bytes:,}"]
                   for line in out.splitlines())  # fmt: skip
    assert "No problem found (names, shapes and dtypes; --values checks the numbers too)." in out


def test_inspect_prints_json(tmp_path: Path, capsys: Output) -> None:
    write_small(tmp_path)
    assert main(["checkpoint", "inspect", str(tmp_path), "--json", "--values"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads(json.dumps(inspect_checkpoint(tmp_path, values=True).to_dict()))
    assert captured.err == "", "no progress bar where nobody watches"


def test_inspect_names_every_problem_and_fails(tmp_path: Path, capsys: Output) -> None:
    path = write_small(tmp_path)
    damage(path, lambda t: [t.pop(name) for name in list(t) if name.startswith("layers.") and "scale" not in name])
    assert main(["checkpoint", "inspect", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    problems = inspect_checkpoint(tmp_path).problems
    assert len(problems) > PROBLEMS_SHOWN
    assert f"{len(problems)} problems:" in out and f"and {len(problems) - PROBLEMS_SHOWN} more; --json" in out
    lines = out.splitlines()
    assert all(f"  {problem}" in lines for problem in problems[:PROBLEMS_SHOWN]), "unwrapped, so that grep finds them"
    assert main(["checkpoint", "inspect", str(tmp_path), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["problems"] == list(problems)


def test_synthesize_writes_what_was_asked_for(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_dict()))
    target = tmp_path / "new" / "checkpoint"
    arguments = ["--shape", str(tmp_path), "--weights", "bf16", "--dialect", "transformers", "--max-shard", "100kB"]
    assert main(["checkpoint", "synthesize", str(target), *arguments]) == 0
    assert str(target) in capsys.readouterr().out
    reader = CheckpointReader(target)
    assert reader.shape == SMALL and len(reader.files) > 1 and "layer_types" in reader.config


def test_synthesize_brings_tinys_tokenizer(tmp_path: Path) -> None:
    assert main(["checkpoint", "synthesize", str(tmp_path / "new"), "--weights", "fp32", "--seed", "3"]) == 0
    assert CheckpointReader(tmp_path / "new").shape == TINY_SHAPE
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == TOKENIZER_FILE.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["inspect", "nowhere"], "There is no config.json in nowhere."),
        (["synthesize", "new", "--shape", "flahs"], "--shape 'flahs' is neither a known shape nor a config.json. Did"),
        (["synthesize", "new", "--max-shard", "big"], "--max-shard 'big' is no size."),
        (["synthesize", "new", "--tokenizer", "t.json"], "There is no tokenizer file t.json."),
        (["synthesize", "new", "--tokenizer", "."], "There is no tokenizer file .."),
        (["synthesize", "new", "--tokenizer", "file"], "file cannot be read as JSON: Expecting value"),
        (["synthesize", "new", "--tokenizer", "words.json"], "words.json is a WordPiece tokenizer with decoder None;"),
        (
            ["synthesize", "new", "--tokenizer", "large.json"],
            "The tokenizer large.json has 5,001 ids, but this shape has rows for 4,096 only.",
        ),
        (["synthesize", "file"], "file cannot be made a directory: File exists."),
        (["synthesize", "file/new"], "file/new cannot be made a directory: Not a directory."),
        (["synthesise", "new"], "synthesise"),
    ],
)  # fmt: skip
def test_mistakes_get_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("words.json").write_text('{"model": {"type": "WordPiece", "vocab": {"a": 0}}}')
    large = json.loads(TOKENIZER_FILE.read_text())
    large["added_tokens"].append(large["added_tokens"][0] | {"id": 5000, "content": "<extra>"})
    Path("large.json").write_text(json.dumps(large))
    assert main(["checkpoint", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not Path("new").exists()


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**9}))
    assert main(["checkpoint", "synthesize", str(tmp_path / "new"), "--shape", "flash"]) == 2
    assert "The checkpoint needs 149 GiB, but" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_group_explains_itself(capsys: Output) -> None:
    assert main(["checkpoint"]) == 0
    out = capsys.readouterr().out
    assert "Show what a checkpoint holds" in out and "Write a checkpoint of random weights." in out
