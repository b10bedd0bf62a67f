"""Energy counters of made-up devices, and what the report says of them or of none."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

import pytest

from triptych.cli.bench import _meter
from triptych.workload.clients import Counts
from triptych.workload.energy import Energy, Meter, NvmlGpu, RaplZone, nvml_gpus, rapl_zones
from triptych.workload.load import Timing
from triptych.workload.load_page import write_page
from triptych.workload.load_report import Slo, summary, table


class Fake:
    """Counts what it is told to."""

    def __init__(self, name: str, *readings: float | None) -> None:
        self.name = name
        self._readings = list(readings)
        self.reads = 0

    def joules(self) -> float:
        self.reads += 1
        now = self._readings.pop(0) if len(self._readings) > 1 else self._readings[0]
        if now is None:
            raise OSError("gone")
        return now


class Nvml:
    """NVML as ctypes sees it: functions that write through pointers and return a status."""

    def __init__(self, millijoules: list[int], *, init: int = 0, energy: int = 0) -> None:
        self.millijoules, self._init, self._energy = millijoules, init, energy

    def nvmlInit_v2(self) -> int:
        return self._init

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = len(self.millijoules)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, handle: Any) -> int:
        handle._obj.value = index.value + 1
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: ctypes.c_void_p, spent: Any) -> int:
        assert handle.value is not None
        spent._obj.value = self.millijoules[handle.value - 1]
        return self._energy


def zone(root: Path, name: str = "package-0", at: int = 5_000_000, most: int = 10_000_000) -> Path:
    folder = root / f"intel-rapl:{len(list(root.iterdir()))}"
    folder.mkdir()
    for file, text in (("name", name), ("energy_uj", str(at)), ("max_energy_range_uj", str(most))):
        (folder / file).write_text(f"{text}\n")
    return folder


def test_a_processors_counter_begins_again_and_the_sum_does_not(tmp_path: Path) -> None:
    folder = zone(tmp_path)
    package = RaplZone(folder)
    found = []
    for now in (5_000_000, 9_000_000, 2_000_000, 1_000_000):
        (folder / "energy_uj").write_text(str(now))
        found.append(package.joules())
    assert package.name == "cpu package-0"
    assert found == [5.0, 9.0, 12.0, 21.0]  # 10 J a turn


def test_packages_count_and_their_parts_do_not_again(tmp_path: Path) -> None:
    zone(tmp_path), zone(tmp_path, "package-1")
    part = tmp_path / "intel-rapl:0:0"
    part.mkdir()
    found, missing = rapl_zones(tmp_path)
    assert [one.name for one in found] == ["cpu package-0", "cpu package-1"] and missing == ""


def test_no_counter_and_one_that_only_root_reads_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rapl_zones(tmp_path / "nowhere") == ([], "the processor has no counter that this system shows (RAPL)")
    folder = zone(tmp_path)
    real = Path.read_text

    def read(path: Path, *rest: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return real(path, *rest)

    monkeypatch.setattr(Path, "read_text", read)
    found, missing = rapl_zones(tmp_path)
    assert found == [] and f"{folder / 'energy_uj'} may be read by root only" in missing


def test_gpus_count_since_their_driver_was_loaded() -> None:
    library = Nvml([1500, 7000])
    gpus, missing = nvml_gpus(library)
    library.millijoules[1] = 9500
    assert [(gpu.name, gpu.joules()) for gpu in gpus] == [("gpu 0", 1.5), ("gpu 1", 9.5)] and missing == ""
    assert nvml_gpus(Nvml([])) == ([], "there is no NVIDIA GPU")
    assert nvml_gpus(Nvml([1], init=9)) == ([], "the GPU does not tell (NVML answers 9)")
    assert nvml_gpus(Nvml([1], energy=3)) == ([], "the GPU does not tell (NVML answers 3)")
    with pytest.raises(OSError, match="NVML answers 3"):
        NvmlGpu(Nvml([1], energy=3), 0)


def test_a_meter_counts_what_the_block_took_and_reads_in_between() -> None:
    gpu, package = Fake("gpu 0", 100.0, 130.0), Fake("cpu package-0", 7.0, 8.5)
    with Meter([gpu, package], "no memory", every=0.01) as meter:
        deadline = time.monotonic() + 20
        while gpu.reads < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
    found = meter.energy()
    assert gpu.reads >= 3, "the short counter of a processor must be read often"
    assert dict(found.joules) == {"gpu 0": 30.0, "cpu package-0": 1.5}
    assert (found.total, found.told, found.missing) == (31.5, True, "no memory") and found.seconds > 0


def test_a_device_that_stops_telling_is_left_out_whole() -> None:
    with Meter([Fake("gpu 0", 1.0, None), Fake("gpu 1", 1.0, 3.0)]) as meter:
        pass
    assert dict(meter.energy().joules) == {"gpu 1": 2.0}
    assert meter.energy().missing == "gpu 0 stopped telling"


def timings() -> list[Timing]:
    counts = Counts(prompt=100, cached=60, output=10)
    return [Timing(f"s{i // 2}", 0.0, 0.0, [(0.1, 1), (1.0, 9)], 1.0, counts) for i in range(4)]


def test_the_report_says_joules_per_token_and_per_session(tmp_path: Path) -> None:
    found = summary(timings(), Slo(), energy=Energy(2.0, {"gpu 0": 900.0, "cpu package-0": 60.0}))
    energy = found["energy"]
    assert (energy["joules"], energy["watts"]) == (960.0, 480.0)
    assert energy["joules_by_device"] == {"gpu 0": 900.0, "cpu package-0": 60.0}
    assert energy["joules_per_output_token"] == 960 / 40
    assert energy["joules_per_token_run"] == 960 / (40 + 4 * 40)
    assert energy["joules_per_session"] == 960 / 2
    line = (
        "energy 960 J, 480 W on average (gpu 0 900 J, cpu package-0 60 J): 24 J per output token, 4.8 per token run, "
        "480 per session"
    )
    assert line in table(found)
    pytest.importorskip("matplotlib")
    write_page(tmp_path / "page.html", {"a": (found, timings())}, {})
    assert line in (tmp_path / "page.html").read_text()


def test_without_counters_the_report_says_so_and_why() -> None:
    with Meter((), "there is no NVIDIA driver") as meter:
        pass
    found = summary(timings(), Slo(), energy=meter.energy())
    assert found["energy"] == {"joules": None, "not_told": "there is no NVIDIA driver"}
    assert "energy: not told by this device (there is no NVIDIA driver)" in table(found)
    assert "energy" not in summary(timings(), Slo())


def test_a_server_elsewhere_is_not_charged_with_this_machines_energy() -> None:
    assert _meter("http://10.1.2.3:8000/v1").energy().missing == "10.1.2.3 is another machine"
    assert _meter("http://gpu-node:8000").energy().missing == "gpu-node is another machine"
    for here in ("http://127.0.0.1:8000", "localhost:8000", "http://[::1]:8000"):
        assert "another machine" not in _meter(here).energy().missing
