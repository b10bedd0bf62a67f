"""The OpenAPI document says what the server does: fields one by one, and whatever schemathesis makes of it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import requests
import schemathesis
from conftest import Server
from fake_engine import FakeEngine
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks as conformance

from triptych.server import openapi
from triptych.server.app import build_app
from triptych.server.openapi import document
from triptych.server.options import ServerOptions
from triptych.server.schemas import FIELDS
from triptych.text.tokenizer import Tokenizer

CHECKS = [
    schemathesis.checks.not_a_server_error,
    conformance.status_code_conformance,
    conformance.content_type_conformance,
    conformance.response_headers_conformance,
    conformance.response_schema_conformance,
]


@pytest.fixture(scope="module")
def engine(tokenizer: Tokenizer) -> FakeEngine:
    return FakeEngine(tokenizer, max_context=128, max_waiting=256)


@pytest.fixture(scope="module")
def server(engine: FakeEngine) -> Iterator[Server]:
    running = Server(build_app(engine, ServerOptions(max_body=1 << 20)))
    yield running
    running.stop()


def test_every_field_has_a_schema_and_every_schema_a_field() -> None:
    read: set[str] = set()
    for path, (_, table, required, _, _) in openapi._POSTS.items():
        assert set(required) <= table.read
        read |= table.read
        assert set(FIELDS.get(path, {})) <= table.read, path
        assert not table.read & (table.harmless | set(table.refused)), path
    assert set(FIELDS[""]) <= read


def test_the_document_is_served_and_names_every_path(http: httpx.Client, server: Server) -> None:
    served = http.get("/openapi.json").json()
    assert served["paths"] == document("x")["paths"]
    routes = {r.path.replace(":path", ""): r.methods - {"HEAD"} for r in server.app.routes}
    del routes["/openapi.json"]
    routes = {path: methods for path, methods in routes.items() if not path.startswith("/dashboard")}
    assert {p: {m.upper() for m in o} for p, o in served["paths"].items()} == routes


def run(server: Server, engine: FakeEngine, examples: int) -> int:
    """Let schemathesis try every operation with `examples` valid and invalid cases; how many cases ran."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    schema.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
    session = requests.Session()
    count = 0
    for result in schema.get_all_operations():
        assert isinstance(result, Ok), result
        operation = result.ok()

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=st.one_of([operation.as_strategy(generation_mode=mode) for mode in GenerationMode]))
        def each(case: schemathesis.Case) -> None:
            nonlocal count
            count += 1
            case.call_and_validate(session=session, checks=CHECKS, timeout=60)

        each()
        assert not engine.live
    return count


def test_schemathesis_finds_nothing(server: Server, engine: FakeEngine) -> None:
    assert run(server, engine, 25) >= 300


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_schemathesis_finds_nothing_in_ten_thousand_cases(server: Server, engine: FakeEngine) -> None:
    assert run(server, engine, 1000) >= 10_000
