"""What `doctor` says about a machine that is described to it; looking at the real one is an end-to-end test."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from triptych.cli.doctor import PACKAGES, Machine, Package, Report, advise, render

ROOT = Path(__file__).resolve().parents[2]
MACHINE = Machine(
    system="Linux",
    cpu="Some Processor",
    cores=8,
    simd="AVX2",
    memory_total=64 << 30,
    memory_free=32 << 30,
    load=0.5,
    python="3.12.1",
    triptych="0.1.0",
    gpus=(),
)
ALL = tuple(Package(name, "1.0", extra, gives) for name, extra, gives in PACKAGES)


def without(*names: str) -> tuple[Package, ...]:
    """All packages but the named ones."""
    return tuple(replace(package, version=None) if package.name in names else package for package in ALL)


def test_nothing_to_say_about_a_good_machine() -> None:
    assert advise(MACHINE, ALL) == ()
    text = render(Report(MACHINE, ALL, ({"op": "attend", "backend": "cpu", "reason": "it is fast"},), ()))
    for part in ("Some Processor, 8 cores, AVX2, load 0.5", "32 GiB free of 64 GiB", "attend  cpu  it is fast"):
        assert part in text
    assert "Nothing to improve." in text and "missing" not in text


@pytest.mark.parametrize(
    ("machine", "packages", "sentence"),
    [
        (MACHINE, without("numba"), "pip install 'triptych[cpu]'"),
        (MACHINE, without("uvicorn"), "pip install 'triptych[server]'"),
        (replace(MACHINE, gpus=("GPU Z",)), without("triton"), "pip install 'triptych[gpu]'"),
        (
            replace(MACHINE, gpus=("GPU H (141 GiB, compute capability 9.0)",)),
            without("sgl-flash-mla"),
            "pip install --no-deps sgl-flash-mla==",
        ),
        (replace(MACHINE, gpus=("GPU Z",), gpu_problem="GPU Z is old."), ALL, "GPU Z is old. The processor is used."),
        (replace(MACHINE, load=7.5), ALL, "7.5 of 8 cores busy"),
        (replace(MACHINE, memory_free=1 << 30), ALL, "Only 1 GiB of memory is free"),
    ],
)
def test_what_is_slow_comes_with_its_remedy(machine: Machine, packages: tuple[Package, ...], sentence: str) -> None:
    [advice] = advise(machine, packages)
    assert sentence in advice
    assert advice in render(Report(machine, packages, ({"op": "a", "backend": "b", "reason": "c"},), (advice,)))


def test_every_package_of_every_extra_is_listed() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    declared = {
        (re.split(r"[<>=;]", line)[0].strip(), extra) for extra in extras if extra != "dev" for line in extras[extra]
    }
    assert declared == {(name, extra) for name, extra, _ in PACKAGES if extra}


def test_missing_packages_are_listed_with_their_extra() -> None:
    text = render(Report(MACHINE, without("triton"), ({"op": "a", "backend": "b", "reason": "c"},), ()))
    [line] = [line for line in text.splitlines() if "triton" in line]
    assert "missing" in line and "pip install 'triptych[gpu]'" in line


def test_a_machine_that_does_not_tell_its_load_is_fine() -> None:
    machine = replace(MACHINE, load=None)
    assert advise(machine, ALL) == ()
    assert "load unknown" in render(Report(machine, ALL, ({"op": "a", "backend": "b", "reason": "c"},), ()))
