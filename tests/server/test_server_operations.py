"""Health, models, metrics, request ids and the access log."""

from __future__ import annotations

import logging
import re

import httpx
import openai
import pytest
from conftest import Server, wait_for
from fake_engine import FakeEngine
from prometheus_client.parser import text_string_to_metric_families

from triptych.errors import ConfigError
from triptych.server.options import ServerOptions

SECRET = "a secret nobody may log"


def metrics_of(http: httpx.Client) -> dict[str, float]:
    """Every sample of /metrics by its name and labels."""
    samples = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            samples[sample.name + "".join(f"|{v}" for _, v in sorted(sample.labels.items()))] = sample.value
    return samples


def test_health_and_models(client: openai.OpenAI, http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok", "model": "fake"}
    assert http.get("/health/live").status_code == 200
    assert [model.id for model in client.models.list()] == ["fake", "an-alias"]
    assert client.models.retrieve("an-alias").owned_by == "triptych"
    assert http.get("/v1/models").json()["data"][0]["max_model_len"] == 4096


def test_draining_refuses_new_requests_and_says_so(server: Server, http: httpx.Client) -> None:
    server.app.state.server.draining = True
    refused = http.post("/v1/completions", json={"model": "fake", "prompt": "x"})
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "2"
    assert refused.json()["error"]["message"].startswith("The server is shutting down")
    health = http.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "draining")
    assert http.get("/health/live").status_code == 200
    assert http.get("/metrics").status_code == 200


def test_metrics_count_what_was_served(client: openai.OpenAI, http: httpx.Client, engine: FakeEngine) -> None:
    for _ in range(3):
        client.completions.create(model="fake", prompt=[1, 2], max_tokens=10)
    list(client.completions.create(model="fake", prompt=[1, 2], max_tokens=10, stream=True))
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="fake", prompt=[])
    http.get("/wp-login.php")
    wait_for(lambda: metrics_of(http).get("triptych_requests_total|other|404") == 1)
    wait_for(lambda: metrics_of(http)["triptych_request_seconds_count"] == 4)
    found = metrics_of(http)
    assert found["triptych_requests_total|/v1/completions|200"] == 4
    assert found["triptych_requests_total|/v1/completions|400"] == 1
    assert found["triptych_requests_total|other|404"] == 1
    assert found["triptych_prompt_tokens_total"] == 8
    assert found["triptych_generated_tokens_total"] == engine.stats().generated_tokens == 40
    assert found["triptych_cache_pages_free"] == 7
    assert found["triptych_running_requests"] == found["triptych_requests_in_flight"] == 0
    assert found["triptych_time_to_first_token_seconds_count"] == 4
    assert found["triptych_request_seconds_count"] == 4
    assert 4 <= found["triptych_inter_token_seconds_count"] <= 36


def test_metrics_of_two_apps_do_not_mix(http: httpx.Client, server: Server) -> None:
    """Each app has its own registry: building a second one in the same process must work and count apart."""
    from triptych.server.app import build_app

    second = build_app(server.app.state.server.engine, ServerOptions())
    http.post("/v1/completions", json={"model": "fake", "prompt": "x", "max_tokens": 1})
    assert b'status="200"' not in second.state.server.metrics.text()


def test_every_answer_has_a_request_id(http: httpx.Client) -> None:
    made = http.get("/health").headers["x-request-id"]
    assert re.fullmatch(r"req-[0-9a-f]{32}", made)
    assert http.get("/health", headers={"x-request-id": "mine.1:a"}).headers["x-request-id"] == "mine.1:a"
    for bad in ("a b", "x" * 200, "é".encode()):
        answer = http.get("/nowhere", headers={"x-request-id": bad})
        assert answer.headers["x-request-id"].startswith("req-")


def test_one_log_line_per_request_without_its_text(
    client: openai.OpenAI, http: httpx.Client, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "triptych")
    messages = [{"role": "user", "content": SECRET}]
    answer = client.chat.completions.create(
        model="fake", messages=messages, max_tokens=12, extra_headers={"x-request-id": "abc"}
    )
    http.post("/v1/chat/completions", json={"model": "fake", "messages": SECRET, SECRET: SECRET})
    http.get(f"/nowhere%0Aforged/{'x' * 500}?key={SECRET}")
    lines: list[str] = []

    def logged() -> bool:  # a line is written when the answer is already out
        lines[:] = [r.getMessage() for r in caplog.records if r.name == "triptych.access"]
        return len(lines) == 3

    wait_for(logged)
    assert re.fullmatch(
        rf"id=abc POST /v1/chat/completions status=200 prompt={answer.usage.prompt_tokens} cached=0 recomputed=0 "
        r"completion=12 ttft=\d+\.\d{3} duration=\d+\.\d{3}",
        lines[0],
    )
    assert "status=400" in lines[1] and "ttft=-" in lines[1]
    assert "\n" not in lines[2] and len(lines[2]) < 400
    said = answer.choices[0].message.content
    ours = "\n".join(r.getMessage() for r in caplog.records if r.name.startswith(("triptych", "uvicorn")))
    assert SECRET not in ours and said not in ours


def test_a_client_that_left_is_logged_as_such(
    server: Server, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engine.token_delay = 0.01
    with server.client() as client:
        stream = client.completions.create(model="fake", prompt=[1], max_tokens=4000, stream=True)
        next(iter(stream))
        stream.close()
    wait_for(lambda: any("status=499" in r.getMessage() for r in caplog.records))


@pytest.mark.parametrize(
    "change",
    [
        {"port": 70000},
        {"max_body": 0},
        {"keep_alive": 0.0},
        {"drain_timeout": -1.0},
        {"log_level": "loud"},
        {"served_model_name": ""},
        {"aliases": ("",)},
        {"encode_threads": 0},
    ],
)
def test_options_that_cannot_work_are_refused(change: dict[str, object]) -> None:
    [name] = change
    with pytest.raises(ConfigError, match=name.removeprefix("served_").removesuffix("es")[:5].replace("alias", "name")):
        ServerOptions(**change)  # type: ignore[arg-type]


def test_a_served_name_replaces_the_engines(tokenizer: object, engine: FakeEngine) -> None:
    from triptych.server.app import build_app

    app = build_app(engine, ServerOptions(served_model_name="org/model", aliases=("m",)))
    running = Server(app)
    try:
        with running.client() as client:
            assert [model.id for model in client.models.list()] == ["org/model", "m"]
            assert client.models.retrieve("org/model").id == "org/model"
            with pytest.raises(openai.NotFoundError):
                client.completions.create(model="fake", prompt="x")
    finally:
        running.stop()
