"""Energy that this machine has used, as far as its devices tell: NVIDIA GPUs by NVML, processors by RAPL.

Both count joules since some start of their own, so nothing is sampled and integrated: energy is the difference of two
readings. RAPL's counter is short (an hour at 65 W on many machines) and begins again; it is read often enough for that.
What is counted is the whole device, whoever uses it, and no memory, fans or power supply beyond it.

Sources: NVML API reference, nvmlDeviceGetTotalEnergyConsumption (millijoules since the driver was loaded, Volta and
later); Linux kernel documentation, power/powercap (energy_uj and max_energy_range_uj, microjoules).
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")
_EVERY = 10.0  # seconds between readings


class Counter(Protocol):
    """One device that counts its energy."""

    name: str

    def joules(self) -> float:
        """Joules since some fixed moment; never less than before. OSError if the device stopped telling."""


class RaplZone:
    """One processor package under /sys/class/powercap."""

    def __init__(self, folder: Path) -> None:
        """OSError if its counter may not be read: on most systems that takes root."""
        self.name = f"cpu {(folder / 'name').read_text().strip()}"
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._before = self._read()
        self._whole = 0

    def joules(self) -> float:
        """Counted over the turns of the counter, which must be read at least once in each."""
        now = self._read()
        self._whole += self._range if now < self._before else 0
        self._before = now
        return (self._whole + now) / 1e6

    def _read(self) -> int:
        return int(self._file.read_text())


def rapl_zones(root: Path = POWERCAP) -> tuple[list[Counter], str]:
    """The packages of this machine, and if there are none, why."""
    folders = [folder for folder in sorted(root.glob("intel-rapl:*")) if folder.name.count(":") == 1]
    zones: list[Counter] = []
    for folder in folders:
        try:
            zones.append(RaplZone(folder))
        except PermissionError:
            return [], f"the processor's counter {folder / 'energy_uj'} may be read by root only"
        except (OSError, ValueError):
            continue  # a zone that this processor does not count
    return zones, "" if zones else "the processor has no counter that this system shows (RAPL)"


class NvmlGpu:
    """One GPU by its handle in NVML."""

    def __init__(self, library: Any, index: int) -> None:
        """OSError if there is no such GPU or it does not count."""
        self.name = f"gpu {index}"
        self._library = library
        self._handle = ctypes.c_void_p()
        _check(library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(self._handle)))
        self.joules()

    def joules(self) -> float:
        """Since the driver was loaded."""
        spent = ctypes.c_ulonglong()
        _check(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(spent)))
        return spent.value / 1e3


def nvml_gpus(library: Any = None) -> tuple[list[Counter], str]:
    """The NVIDIA GPUs of this machine, and if there are none, why. `library`: NVML, loaded if it is not given."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1") if library is None else library
        _check(library.nvmlInit_v2())
        count = ctypes.c_uint()
        _check(library.nvmlDeviceGetCount_v2(ctypes.byref(count)))
        gpus: list[Counter] = [NvmlGpu(library, index) for index in range(count.value)]
    except (OSError, AttributeError) as error:  # no driver, or one that is too old to count
        return [], "there is no NVIDIA driver" if "libnvidia" in str(error) else f"the GPU does not tell ({error})"
    return gpus, "" if gpus else "there is no NVIDIA GPU"


def _check(status: int) -> None:
    if status:
        raise OSError(f"NVML answers {status}")


@dataclass(frozen=True, slots=True)
class Energy:
    """Joules by device over `seconds`. `missing`: what does not tell, and why; shown where nothing else is known."""

    seconds: float = 0.0
    joules: Mapping[str, float] = field(default_factory=dict)
    missing: str = ""

    @property
    def total(self) -> float:
        """Of all devices that tell."""
        return sum(self.joules.values())

    @property
    def told(self) -> bool:
        """False if no device says anything."""
        return bool(self.joules)


def sum_of(energies: Sequence[Energy]) -> Energy:
    """Several stretches of time as one."""
    joules: dict[str, float] = {}
    for one in energies:
        for name, value in one.joules.items():
            joules[name] = joules.get(name, 0.0) + value
    missing = next((one.missing for one in energies if one.missing), "")
    return Energy(sum(one.seconds for one in energies), joules, missing)


class Meter:
    """Counts from entering to leaving a `with` block."""

    def __init__(self, counters: Sequence[Counter], missing: str = "", every: float = _EVERY) -> None:
        self._counters, self._missing, self._every = list(counters), missing, every
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._began = self._ended = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_reading, name="energy", daemon=True)

    @classmethod
    def of_this_machine(cls) -> Meter:
        """Everything here that tells."""
        gpus, no_gpu = nvml_gpus()
        packages, no_package = rapl_zones()
        return cls([*gpus, *packages], "; ".join(filter(None, (no_gpu, no_package))))

    def __enter__(self) -> Meter:
        self._began = time.monotonic()
        self._first = self._last = self._read()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._last = self._read()
        self._ended = time.monotonic()

    def energy(self) -> Energy:
        """What was counted; of a device that stopped telling nothing, because a part is no answer."""
        spent = {name: self._last[name] - self._first[name] for name in self._first if name in self._last}
        return Energy(self._ended - self._began, spent, self._missing)

    def _keep_reading(self) -> None:
        while not self._over.wait(self._every):
            self._read()

    def _read(self) -> dict[str, float]:
        found = {}
        for counter in list(self._counters):
            try:
                found[counter.name] = counter.joules()
            except (OSError, ValueError):
                self._counters.remove(counter)
                self._missing = "; ".join(filter(None, (self._missing, f"{counter.name} stopped telling")))
        return found
