"""Endpoint profiles: what they may set, how files are read, and who wins over whom."""

from __future__ import annotations

from pathlib import Path

import pytest

from triptych.cli.flags import EngineFlags
from triptych.config import EngineConfig
from triptych.engine.profiles import DEVICES, PROFILES, profile_named, settable, settings_from_text
from triptych.errors import ConfigError
from triptych.workload.named import WORKLOADS


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("device", DEVICES)
def test_every_shipped_profile_is_a_valid_configuration_and_comes_back_from_its_file(
    name: str, device: str, tmp_path: Path
) -> None:
    profile = PROFILES[name]
    EngineConfig.from_options(**profile.on(device))
    assert set(profile.on(device)) <= set(settable())
    path = tmp_path / "own.toml"
    path.write_text(profile.toml())
    again = profile_named(path)
    assert (again.name, again.purpose, again.on(device)) == (profile.name, profile.purpose, profile.on(device))


def test_no_profile_asks_a_gpu_for_what_it_cannot_do() -> None:
    assert not any(profile.on("cuda").get("deterministic") for profile in PROFILES.values())


def test_there_is_a_profile_for_every_workload() -> None:
    assert set(PROFILES) == set(WORKLOADS) - {"agents"}


def test_a_file_builds_on_a_profile_and_its_tables_win(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "chat"\nttl = 7\nkv_memory = "2GiB"\nmax_running = 8\n[cpu]\nmax_running = 3\n')
    profile = profile_named(path)
    assert profile.name == "mine" and profile.purpose == PROFILES["chat"].purpose
    assert profile.on("cpu") == {**PROFILES["chat"].on("cpu"), "ttl": 7, "kv_memory": 2 << 30, "max_running": 3}
    assert profile.on("cuda")["max_running"] == 8, "what the file says wins over what its base says for a device"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stp_tokens = 3", "unknown key 'stp_tokens'. Did you mean 'step_tokens'?"),
        ("[cpu]\nmax_runing = 3", r"\[cpu\]: unknown key 'max_runing'. Did you mean 'max_running'?"),
        ("step_tokens = 1.5", "step_tokens must be of type int, not 1.5"),
        ("deterministic = 1", "deterministic must be of type bool, not 1"),
        ('retention = "lri"', "retention 'lri' is not known. Did you mean 'lru'?"),
        ('kv_memory = "2 Gb of"', "kv_memory '2 Gb of' is no size"),
        ('base = "chats"', "there is no base 'chats'. Did you mean 'chat'?"),
        ("step_tokens = 4\nmax_running = 9", "step_tokens 4 is below max_running 9"),
        ("step_tokens", "is no TOML"),
        ("purpose = 3", "purpose must be a string"),
        ("cpu = 3", "write the options of a device as"),
        ('device = "cpu"', "unknown key 'device'"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence.replace("?", r"\?")) as refused:
        profile_named(path)
    assert "own.toml" in str(refused.value)


def test_unknown_names_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no profile 'chatt'\. Did you mean 'chat'"):
        profile_named("chatt")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        profile_named(tmp_path / "none.toml")


def test_flags_name_the_profile_and_stand_beside_it() -> None:
    flags = EngineFlags(profile="chat", step_tokens=64, deterministic=False)
    assert flags.options() == {"profile": "chat", "step_tokens": 64, "deterministic": False}
    assert flags.arguments() == ["--profile", "chat", "--step-tokens", "64", "--no-deterministic"]


def test_settings_of_a_contender_are_read_from_text() -> None:
    found = settings_from_text(
        "profile=chat, step-tokens=64,kv_memory=2MiB,policy=periodic:4096,deterministic=true", "x"
    )
    assert found == {
        "profile": "chat",
        "step_tokens": 64,
        "kv_memory": 2 << 20,
        "policy": "periodic:4096",
        "deterministic": True,
    }
    for text, sentence in (
        ("step_tokens", "is no setting"),
        ("stp_tokens=3", "Did you mean 'step_tokens'"),
        ("step_tokens=many", "must be of type int, not 'many'"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            settings_from_text(text, "--against")
