"""/admin: who may pause the engine and give it new weights, from where, and what everyone else sees of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Server, wait_for
from fake_engine import FakeEngine
from test_server_operations import metrics_of
from torch import Tensor
from typer.testing import CliRunner

from triptych.checkpoint import CheckpointReader, write_checkpoint
from triptych.cli.serve import app as serve
from triptych.engine.api import AsyncEngine, Engine
from triptych.errors import ConfigError
from triptych.server.app import build_app
from triptych.server.keys import load_keys
from triptych.server.openapi import document
from triptych.server.options import ServerOptions
from triptych.tiny.bundle import ensure_checkpoint
from triptych.words import SamplingParams

KEYS = """
[[key]]
name = "trainer"
key = "sk-trainer-01"
admin = true

[[key]]
name = "alice"
key = "sk-alice-0001"
"""
TRAINER, ALICE = ({"authorization": f"Bearer {key}"} for key in ("sk-trainer-01", "sk-alice-0001"))
UPDATE = "/admin/update_weights"
BYTES = {"content-type": "application/octet-stream"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("weights/step-1", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "weights" / "half").mkdir()
    return tmp_path / "weights"


@pytest.fixture
def options(root: Path) -> ServerOptions:
    return ServerOptions(max_body=1 << 16, weights_root=str(root), body_timeout=0.5)


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


def test_off_unless_a_directory_is_named(engine: FakeEngine) -> None:
    server = Server(build_app(engine))
    with server.http() as http:
        assert http.post("/admin/pause").status_code == 404
        assert http.post(UPDATE, json={"path": "step-1"}).status_code == 404
        assert not [path for path in http.get("/openapi.json").json()["paths"] if path.startswith("/admin")]
    server.stop()
    assert engine.state == "running" and not engine.updates


def test_only_keys_with_admin_rights(engine: FakeEngine, options: ServerOptions, tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(KEYS)
    server = Server(build_app(engine, options, load_keys(str(tmp_path / "keys.toml"))))
    with server.http() as http:
        for method, path in (("GET", "/admin/state"), ("POST", "/admin/pause"), ("POST", UPDATE)):
            assert http.request(method, path).status_code == 401
            refused = http.request(method, path, headers=ALICE)
            assert refused.status_code == 403 and "admin rights" in refused.json()["error"]["message"]
        assert http.post("/admin/pause", headers=TRAINER).json()["state"] == "paused"
        assert http.post(UPDATE, headers=TRAINER, json={"path": "step-1"}).status_code == 200
    server.stop()


def test_a_pause_shows_everywhere_and_ends(http: httpx.Client, engine: FakeEngine) -> None:
    assert http.get("/admin/state").json() == {"state": "running", "weights": 0, "running": 0, "waiting": 0}
    assert http.post("/admin/pause").json()["state"] == "paused"
    health = http.get("/health")
    assert (health.status_code, health.json()) == (503, {"status": "paused"}) and "retry-after" in health.headers
    assert http.get("/health/live").status_code == 200
    assert http.get("/dashboard/data").json()["state"] == "paused"
    found = metrics_of(http)
    assert (found["triptych_engine_state|paused"], found["triptych_engine_state|running"]) == (1, 0)
    assert http.post("/admin/resume").json()["state"] == "running"
    assert http.get("/health").status_code == 200
    assert metrics_of(http)["triptych_engine_state|running"] == 1


def test_an_update_takes_a_directory_below_the_root(http: httpx.Client, engine: FakeEngine, root: Path) -> None:
    done = http.post(UPDATE, json={"path": "step-1", "running": "recompute", "timeout": 9})
    assert done.status_code == 200 and done.json()["version"] == 1 and done.json()["identity"] == "ab" * 32
    assert engine.updates == [(str(root / "step-1"), "recompute", 9.0)]
    assert http.post(UPDATE, json={"path": str(root / "step-1")}).status_code == 200
    assert engine.updates[1][1:] == ("drain", None)
    assert metrics_of(http)["triptych_weights_updates_total"] == 2
    assert http.get("/dashboard/data").json()["weights"] == 2


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ({}, 400, "path is missing"),
        ({"path": "../elsewhere"}, 403, "leaves the directory"),
        ({"path": "/etc"}, 403, "leaves the directory"),
        ({"path": "half"}, 400, "no checkpoint"),
        ({"path": "a\u0000b"}, 400, "path"),
        ({"path": "step-1", "running": "drian"}, 400, "'drain'"),
        ({"path": "step-1", "timeout": 0}, 400, "timeout"),
        ({"path": "step-1", "mode": "abort"}, 400, "mode"),
        ({"path": 7}, 400, "path must be a string"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(
    http: httpx.Client, engine: FakeEngine, body: dict[str, object], status: int, sentence: str
) -> None:
    refused = http.post(UPDATE, json=body)
    assert refused.status_code == status, refused.text
    assert sentence in refused.json()["error"]["message"]
    assert not engine.updates


def test_a_file_may_be_larger_than_any_other_body(http: httpx.Client, engine: FakeEngine) -> None:
    data = bytes(range(256)) * 2000
    assert http.post(UPDATE, content=data, headers=BYTES, params={"running": "abort", "timeout": 3}).status_code == 200
    assert engine.updates == [(data, "abort", 3.0)]
    for params in ({"running": "later"}, {"timeout": "soon"}, {"path": "step-1"}):
        assert http.post(UPDATE, content=data, headers=BYTES, params=params).status_code == 400
    assert len(engine.updates) == 1


def test_a_file_that_does_not_come_is_not_waited_for(http: httpx.Client, engine: FakeEngine) -> None:
    stuck = threading.Event()

    def slowly() -> Iterator[bytes]:
        yield b"abc"
        stuck.wait(20.0)

    try:
        refused = http.post(UPDATE, content=slowly(), headers=BYTES)
        assert refused.status_code == 408
    except httpx.TransportError:
        pass  # the connection was closed while the client was still sending
    finally:
        stuck.set()
    assert not engine.updates


def test_an_update_waits_for_requests_and_a_client_that_leaves_takes_it_back(
    server: Server, http: httpx.Client, engine: FakeEngine
) -> None:
    engine.token_delay = 0.02
    answer = threading.Thread(
        target=lambda: http.post("/v1/completions", json={"model": "fake", "prompt": [1], "max_tokens": 100})
    )
    answer.start()
    wait_for(lambda: bool(engine.live))
    with server.http() as impatient, pytest.raises(httpx.ReadTimeout):
        impatient.post(UPDATE, json={"path": "step-1"}, timeout=0.3)
    wait_for(lambda: engine.state == "running")
    assert not engine.updates and engine.live
    with server.http() as other:
        late = other.post(UPDATE, json={"path": "step-1", "timeout": 0.05})
        assert late.status_code == 503
        assert other.post(UPDATE, json={"path": "step-1"}).status_code == 200
    assert not engine.live
    answer.join()


def test_pausing_is_never_refused_because_many_requests_run(
    server: Server, http: httpx.Client, engine: FakeEngine
) -> None:
    server.app.state.server._in_flight = 10_000
    assert http.post("/v1/completions", json={"model": "fake", "prompt": "x"}).status_code == 429
    assert http.post("/admin/pause").status_code == 200
    server.app.state.server._in_flight = 0


def test_the_document_names_every_path(http: httpx.Client, server: Server) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    assert paths == document("x", admin=True)["paths"]
    routes = {r.path: r.methods - {"HEAD"} for r in server.app.routes if r.path.startswith("/admin")}
    assert routes == {p: {m.upper() for m in o} for p, o in paths.items() if p.startswith("/admin")}


def test_a_root_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no directory"):
        ServerOptions(weights_root=str(tmp_path / "nowhere"))


def test_the_command_does_not_offer_it_to_everyone(tmp_path: Path) -> None:
    result = CliRunner().invoke(serve, ["--host", "0.0.0.0", "--weights-root", str(tmp_path)])
    assert isinstance(result.exception, ConfigError) and "--api-keys" in str(result.exception)


def test_the_real_engine_behind_it_says_what_a_fresh_one_says(tmp_path: Path) -> None:
    """By a file that is sent, and by a directory; requests of the time before end on the weights of that time."""
    old = ensure_checkpoint(tmp_path / "old")
    new = tmp_path / "root" / "step-1"
    reader = CheckpointReader(old)
    moved = ((name, tensor * 1.2 if name == "head.weight" else tensor) for name, tensor in _changed(reader))
    write_checkpoint(new, reader.shape, moved, weights="fp32", tokenizer=old / "tokenizer.json")
    settings: dict[str, Any] = {"kv_memory": 64 << 20, "deterministic": True, "threads": 1}
    body = {"model": "it", "prompt": "Once upon a time there was a harbour", "max_tokens": 12, "temperature": 0}
    said = {}
    for directory in (old, new):
        fresh = Engine.load(directory, **settings)
        params = SamplingParams(max_tokens=12, temperature=0.0)
        said[directory] = list(fresh.generate([str(body["prompt"])], params)[0].token_ids)
        fresh.close()
    assert said[old] != said[new]
    engine = AsyncEngine.load(old, **settings)
    options = ServerOptions(served_model_name="it", weights_root=str(tmp_path / "root"))
    server = Server(build_app(engine, options))
    try:
        with server.http() as http:

            def ask() -> tuple[list[int], dict[str, int]]:
                answer = http.post("/v1/completions", json=body | {"return_token_ids": True}).json()
                details = answer["usage"]["completion_tokens_details"]
                return answer["choices"][0]["token_ids"], details.get("by_weights", {})

            assert ask() == (said[old], {})
            [file] = new.glob("*.safetensors")
            done = http.post(UPDATE, content=file.read_bytes(), headers=BYTES)
            assert done.status_code == 200, done.text
            assert ask() == (said[new], {"1": 12})
            cut = http.post(UPDATE, content=file.read_bytes()[:-100], headers=BYTES)
            assert cut.status_code == 400 and "end early" in cut.json()["error"]["message"]
            again = http.post(UPDATE, json={"path": "step-1", "running": "recompute"})
            assert again.json()["identity"] == done.json()["identity"]
            assert ask() == (said[new], {"2": 12})
    finally:
        server.stop()


def _changed(reader: CheckpointReader) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in reader.tensors(show_progress=False):
        yield name, tensor.flip(0) if name.endswith("attn.wq_b.weight") else tensor
