"""Endpoint profiles: the settings that suit one kind of traffic, by name or from a TOML file. Knows no torch.

    what was given  >  the profile's table for the device  >  the profile  >  the profile it builds on  >  defaults

A profile sets only what depends on the traffic. What depends on the machine, like memory, is left to its owner. Why
each number is what it is, with the measurement, stands in docs/profiles.md.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from triptych.config import CacheConfig, EngineConfig
from triptych.engine.options import SIZES, typed
from triptych.errors import ConfigError, nearest

Options = Mapping[str, Any]

DEVICES = ("cpu", "cuda")
_ABOUT = ("name", "purpose", "base")


@dataclass(frozen=True, slots=True)
class Profile:
    """`options` by the names of EngineConfig and CacheConfig; `by_device` adds some on a processor or on a GPU."""

    name: str
    purpose: str
    options: Options = field(default_factory=dict)
    by_device: Mapping[str, Options] = field(default_factory=dict)

    def on(self, device: str) -> dict[str, Any]:
        """All options on `device`, "cpu" or "cuda"."""
        return {**self.options, **self.by_device.get(device, {})}

    def toml(self) -> str:
        """The profile as a file that `profile_named` reads."""
        lines = [f"name = {_written(self.name)}", f"purpose = {_written(self.purpose)}"]
        lines += [f"{key} = {_written(value)}" for key, value in self.options.items()]
        for device, options in self.by_device.items():
            lines += ["", f"[{device}]", *(f"{key} = {_written(value)}" for key, value in options.items())]
        return "\n".join(lines)


PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            "chat",
            "People who wait for the first word and read along.",
            {},
            {"cpu": {"max_running": 16, "step_tokens": 512}, "cuda": {"max_running": 16, "step_tokens": 2048}},
        ),
        Profile(
            "coding-agent",
            "Agents that come back in seconds with a little more of a long context.",
            {},
            {"cpu": {"max_running": 8, "step_tokens": 2048}, "cuda": {"max_running": 8, "step_tokens": 2048}},
        ),
        Profile(
            "research-agent",
            "Few agents with very long contexts, read page after page.",
            {},
            {"cpu": {"max_running": 3, "step_tokens": 2048}, "cuda": {"max_running": 4, "step_tokens": 2048}},
        ),
        Profile(
            "rl-rollout",
            "Many samples of each prompt, all at once; nobody waits for a single one.",
            {},
            {
                "cpu": {"max_running": 32, "step_tokens": 2048, "deterministic": True},
                "cuda": {"max_running": 64, "step_tokens": 8192},
            },
        ),
        Profile("mixed", "All of these at one endpoint.", {}, {"cpu": {"max_running": 16, "step_tokens": 2048}}),
    )
}


def settable() -> tuple[str, ...]:
    """Names of the options that a profile may set."""
    names = {item.name for kind in (EngineConfig, CacheConfig) for item in fields(kind)}
    return tuple(sorted(names - {"cache", "device", "tenant_shares"}))


def profile_named(name: str | Path) -> Profile:
    """The shipped profile `name`, or the one in the TOML file at that path. ConfigError names the nearest."""
    if str(name) in PROFILES:
        return PROFILES[str(name)]
    path = Path(name).expanduser()
    if path.suffix == ".toml" or path.is_file():
        return _read(path)
    raise ConfigError(f"There is no profile {str(name)!r}.", nearest(str(name), PROFILES))


def _read(path: Path) -> Profile:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Profile {path} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"Profile {path} is no TOML: {error}.") from None
    for key in _ABOUT:
        if not isinstance(raw.get(key, ""), str):
            raise ConfigError(f"{path}: {key} must be a string, not {raw[key]!r}.")
    base = Profile("", "")
    if "base" in raw:
        if raw["base"] not in PROFILES:
            raise ConfigError(f"{path}: there is no base {raw['base']!r}.", nearest(raw["base"], PROFILES))
        base = PROFILES[raw["base"]]
    own = {key: value for key, value in raw.items() if key not in (*_ABOUT, *DEVICES)}
    options = {**base.options, **_checked(own, (*settable(), *_ABOUT, *DEVICES), str(path))}
    tables = {}
    for device in DEVICES:
        table = raw.get(device, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: write the options of a device as [{device}].")
        # what the file says for all devices wins over what its base says for one
        inherited = {key: value for key, value in base.by_device.get(device, {}).items() if key not in own}
        tables[device] = {**inherited, **_checked(table, settable(), f"{path}, [{device}]")}
    found = Profile(raw.get("name", path.stem), raw.get("purpose", base.purpose), options, tables)
    for device in DEVICES:  # now, so that a wrong value is found before anything is loaded
        _config_of(found.on(device), str(path))
    return found


def _checked(given: Mapping[str, Any], known: tuple[str, ...], where: str) -> dict[str, Any]:
    """`given` with sizes in bytes. ConfigError for a key that is no option."""
    for key in given:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}.", nearest(key, known))
    return {key: typed(key, value, where) for key, value in given.items()}


def _config_of(options: Mapping[str, Any], where: str) -> EngineConfig:
    try:
        return EngineConfig.from_options(**options)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", error.remedy) from None


def settings_from_text(text: str, flag: str) -> dict[str, Any]:
    """Options written as `profile=chat,step_tokens=64,kv_memory=64MiB`. ConfigError names `flag`, the nearest key."""
    found: dict[str, Any] = {}
    for pair in text.split(","):
        key, equals, value = (piece.strip() for piece in pair.partition("="))
        key = key.removeprefix("--").replace("-", "_")
        if not equals or not value:
            raise ConfigError(f"{flag} {text!r}: {pair!r} is no setting.", "Write it like profile=chat,step_tokens=64.")
        if key == "profile":
            found[key] = value
        else:
            found |= _checked({key: _from_text(key, value)}, (*settable(), "profile"), f"{flag} {text!r}")
    return found


def _from_text(key: str, text: str) -> Any:
    """`text` as TOML reads it, or as it is."""
    if key in SIZES:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _written(value: object) -> str:
    """A value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)
