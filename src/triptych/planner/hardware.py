"""What hardware can do and costs, from data sheets: devices and nodes by name, and entries of the user's own.

The numbers and their sources are in hardware.toml.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from triptych.errors import ConfigError, nearest, reason_of

Numeric = Literal["fp4", "fp8", "bf16", "fp32"]
_WIDER: tuple[Numeric, ...] = ("fp4", "fp8", "bf16", "fp32")
_CATALOGUE = Path(__file__).parent / "hardware.toml"
_NUMBERS = ("memory", "bandwidth", "fp32", "bf16", "fp8", "fp4", "link", "host_link", "rent", "own")
_NEEDED = ("name", "memory", "bandwidth", "fp32", "source")


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, or one processor with its memory. Bytes, bytes per second, operations per second, USD per hour.

    `flops` by format is dense; `link` goes to the other devices of a node and `host_link` to host memory, both in one
    direction. `rent` and `own` are None where no source is known.
    """

    key: str
    name: str
    memory: float
    bandwidth: float
    flops: Mapping[Numeric, float]
    link: float
    host_link: float
    rent: float | None
    own: float | None
    source: str
    reported: tuple[str, ...] = ()

    def rate(self, numeric: Numeric) -> float:
        """FLOP per second for products in `numeric`, or in the next wider format that the device has."""
        for wider in _WIDER[_WIDER.index(numeric) :]:
            if wider in self.flops:
                return self.flops[wider]
        raise AssertionError("the catalogue demands fp32")

    @property
    def price(self) -> tuple[float, str] | None:
        """USD per hour and what kind of price it is; rented before owned. None if neither is known."""
        if self.rent is not None:
            return self.rent, "rented"
        return None if self.own is None else (self.own, "owner's total cost")


@dataclass(frozen=True, slots=True)
class Node:
    """`count` equal devices that work together, and `host_memory` bytes beside them."""

    key: str
    device: Device
    count: int
    host_memory: float

    def describe(self) -> str:
        """For the head of a plan."""
        return f"{self.count} x {self.device.name}"


@dataclass(frozen=True)
class Catalogue:
    """Devices and nodes by name."""

    devices: Mapping[str, Device]
    nodes: Mapping[str, Node]

    def node(self, name: str, count: int | None = None) -> Node:
        """The node, or one device as a node, called `name`; with `count` devices if given. ConfigError if unknown."""
        key = name.lower().replace("_", "-").replace(" ", "-")
        if key in self.nodes:
            found = self.nodes[key]
        elif key in self.devices:
            found = Node(key, self.devices[key], 1, 0.0)
        else:
            known = [*self.devices, *self.nodes]
            raise ConfigError(f"--hardware {name!r} is not in the catalogue.", nearest(key, known))
        if count is None or count == found.count:
            return found
        if count < 1:
            raise ConfigError(f"--gpus must be at least 1, not {count}.")
        return replace(found, count=count, host_memory=found.host_memory * count / found.count)

    def reported_as(self, name: str) -> Device | None:
        """The device that a driver calls `name`, or None."""
        return next((device for device in self.devices.values() if name in device.reported), None)


@cache
def built_in() -> Catalogue:
    """The catalogue that comes with the package."""
    return _read(_CATALOGUE, Catalogue({}, {}))


def catalogue(own: Path | None = None) -> Catalogue:
    """The built-in catalogue, with the entries of the TOML file `own` added. ConfigError naming entry and key."""
    return built_in() if own is None else _read(own, built_in())


def _read(path: Path, base: Catalogue) -> Catalogue:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"Hardware file {path} cannot be read: {reason_of(error)}.") from None
    for key in raw:
        if key not in ("device", "node"):
            raise ConfigError(f"{path}: unknown table {key!r}.", nearest(key, ("device", "node")))
    devices = dict(base.devices)
    for key, entry in _tables(raw, "device", path).items():
        devices[key] = _device(key, entry, f"{path.name}, device.{key}")
    nodes = dict(base.nodes)
    for key, entry in _tables(raw, "node", path).items():
        nodes[key] = _node(key, entry, devices, f"{path.name}, node.{key}")
    return Catalogue(devices, nodes)


def _tables(raw: Mapping[str, Any], key: str, path: Path) -> dict[str, dict[str, Any]]:
    found = raw.get(key, {})
    if not isinstance(found, dict) or any(not isinstance(entry, dict) for entry in found.values()):
        raise ConfigError(f"{path}: write entries as [{key}.NAME].")
    return found


def _device(key: str, entry: dict[str, Any], where: str) -> Device:
    known = ("name", "source", "reported", *_NUMBERS)
    _check_keys(entry, known, _NEEDED, where)
    values = {name: _number(entry, name, where) for name in _NUMBERS if name in entry}
    flops = {numeric: values[numeric] * 1e12 for numeric in _WIDER if numeric in values}
    return Device(
        key=key,
        name=str(entry["name"]),
        memory=values["memory"] * 1e9,
        bandwidth=values["bandwidth"] * 1e12,
        flops=flops,
        link=values.get("link", 32.0) * 1e9,
        host_link=values.get("host_link", 32.0) * 1e9,
        rent=values.get("rent"),
        own=values.get("own"),
        source=str(entry["source"]),
        reported=tuple(entry.get("reported", ())),
    )


def _node(key: str, entry: dict[str, Any], devices: Mapping[str, Device], where: str) -> Node:
    _check_keys(entry, ("device", "count", "host_memory"), ("device", "count"), where)
    device = devices.get(entry["device"])
    if device is None:
        raise ConfigError(f"{where}: no device {entry['device']!r}.", nearest(str(entry["device"]), devices))
    count = entry["count"]
    if type(count) is not int or count < 1:
        raise ConfigError(f"{where}: count must be a positive integer, not {count!r}.")
    return Node(key, device, count, _number(entry, "host_memory", where) * 1e9 if "host_memory" in entry else 0.0)


def _check_keys(entry: dict[str, Any], known: tuple[str, ...], needed: tuple[str, ...], where: str) -> None:
    for name in entry:
        if name not in known:
            raise ConfigError(f"{where}: unknown key {name!r}.", nearest(name, known))
    for name in needed:
        if name not in entry:
            raise ConfigError(f"{where} lacks {name!r}.")


def _number(entry: dict[str, Any], name: str, where: str) -> float:
    value = entry[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"{where}: {name} must be a positive number, not {value!r}.")
    return float(value)
