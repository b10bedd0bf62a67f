"""New weights in a running engine: all or nothing, and then as if it had been loaded with them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from triptych.checkpoint import CheckpointReader, safetensors_stream, write_checkpoint
from triptych.checkpoint.names import fused_name, transformers_name
from triptych.config import EngineConfig
from triptych.engine import async_engine
from triptych.engine.api import AsyncEngine, Engine, Output
from triptych.engine.load import LoadedEngine, load
from triptych.engine.renewal import Staged, stage
from triptych.errors import CheckpointError, ConfigError, RequestError, Unavailable
from triptych.tiny.bundle import ensure_checkpoint
from triptych.words import Delta, FinishReason, SamplingParams

OPTIONS: dict[str, Any] = {"kv_memory": 64 << 20, "max_running": 4, "step_tokens": 256, "deterministic": True}
LONG = np.arange(700, dtype=np.int32) % 900 + 50
DRAWS = SamplingParams(max_tokens=6, n=2, seed=5, logprobs=2, ignore_eos=True)
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, logprobs=1, ignore_eos=True)

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def trained(tiny: Path) -> Tensors:
    """The bundled weights after a step of something like training, by official name."""
    rng = torch.Generator().manual_seed(0)

    def moved(tensor: Tensor) -> Tensor:
        return tensor if not tensor.is_floating_point() else tensor + 0.02 * torch.randn(tensor.shape, generator=rng)

    reader = CheckpointReader(tiny)
    return {name: moved(tensor) for name, tensor in reader.tensors(show_progress=False)}


@pytest.fixture(scope="module")
def directory(tiny: Path, trained: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a checkpoint."""
    target = tmp_path_factory.mktemp("trained") / "checkpoint"
    shape = CheckpointReader(tiny).shape
    write_checkpoint(target, shape, trained.items(), weights="fp32", tokenizer=tiny / "tokenizer.json")
    return target


@pytest.fixture
def engine(tiny: Path) -> Iterator[Engine]:
    engine = Engine.load(tiny, **OPTIONS)
    yield engine
    engine.check_integrity()
    engine.close()


def told(outputs: list[Output]) -> list[tuple[Any, ...]]:
    """All that weights decide, to the last bit."""
    return [(out.token_ids, out.logprobs, out.text, out.finish_reason) for out in outputs]


def ask(engine: Engine) -> list[Output]:
    return engine.generate([LONG, LONG[:300], "Once upon a time"], DRAWS)


@pytest.fixture(scope="module")
def wanted(directory: Path) -> list[tuple[Any, ...]]:
    """What an engine says that was loaded with the new weights."""
    fresh = Engine.load(directory, **OPTIONS)
    answers = told(ask(fresh))
    fresh.close()
    return answers


def test_from_a_directory_it_is_as_if_loaded_from_it(
    engine: Engine, directory: Path, wanted: list[tuple[Any, ...]]
) -> None:
    before = told(ask(engine))
    assert before != wanted, "these weights say the same: the test would see nothing"
    done = engine.update_weights(directory)
    assert (done.version, done.aborted, done.recomputed) == (1, 0, 0) and done.bytes > 0
    after = ask(engine)
    assert told(after) == wanted
    assert after[0].usage.cached_tokens == 0, "a page of the old weights was found"
    assert after[0].usage.completion_by_weights == {1: 6}
    assert told(ask(engine)) == wanted, "from the cache"


def test_from_tensors_it_is_the_same_whatever_their_names_and_order(
    engine: Engine, trained: Tensors, wanted: list[tuple[Any, ...]]
) -> None:
    one = engine.update_weights(reversed(trained.items()))
    assert told(ask(engine)) == wanted
    other = engine.update_weights(_as_transformers(trained, engine))
    assert told(ask(engine)) == wanted
    assert one.identity == other.identity and other.version == 2


def _as_transformers(tensors: Tensors, engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """The names of its modules, experts in stacks."""
    stacks: dict[str, dict[tuple[int, int], Tensor]] = {}
    for name, tensor in tensors.items():
        place = fused_name(name)
        if name.startswith("mtp."):
            continue
        if place is None:
            yield transformers_name(name), tensor
        else:
            stacks.setdefault(place[0], {})[place[1], place[2]] = tensor
    for name, parts in stacks.items():
        count = engine.shape.num_experts
        yield name, torch.stack([torch.cat([parts[at] for at in sorted(parts) if at[0] == e]) for e in range(count)])


def test_a_file_may_come_in_pieces_of_any_size(engine: Engine, directory: Path, wanted: list[tuple[Any, ...]]) -> None:
    [file] = directory.glob("*.safetensors")
    raw = file.read_bytes()
    pieces = [raw[:3], raw[3:1000], raw[1000:1001], b"", raw[1001:]]
    engine.update_weights(safetensors_stream(pieces))
    assert told(ask(engine)) == wanted


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda raw: raw[:-5], "end early: 5 bytes"),
        (lambda raw: raw[:5], "end early"),
        (lambda raw: b"GET / HTTP/1.1 and so on", "no safetensors file"),
        (lambda raw: raw[:8] + b"x" + raw[9:], "no header"),
        (lambda raw: raw.replace(b'"F32"', b'"F64"', 1), "cannot be"),
        (lambda raw: b"", "end early"),
    ],
)
def test_a_damaged_file_is_refused(directory: Path, damage: Callable[[bytes], bytes], sentence: str) -> None:
    [file] = directory.glob("*.safetensors")
    with pytest.raises(CheckpointError, match=sentence):
        list(safetensors_stream([damage(file.read_bytes())]))


def test_there_and_back_finds_nothing_in_between(
    tiny: Path, directory: Path, wanted: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    """Host and disk hold pages of both: none is ever taken for the other's."""
    engine = Engine.load(tiny, **OPTIONS, host_memory=16 << 20, disk=str(tmp_path / "disk"))
    before = told(ask(engine))
    for _ in range(2):
        engine.update_weights(directory)
        assert told(ask(engine)) == wanted
        engine.update_weights(tiny)
        assert told(ask(engine)) == before
    engine.close()
    engine = Engine.load(tiny, **OPTIONS, disk=str(tmp_path / "disk"))
    assert told(ask(engine)) == before
    engine.close()


@pytest.mark.parametrize(
    "options",
    [{"numerics": "native"}, {"weight_dtype": "bfloat16"}, {"weight_dtype": "bfloat16", "numerics": "native"}],
    ids=str,
)
def test_every_form_of_weights_is_replaced(tiny: Path, directory: Path, options: dict[str, Any]) -> None:
    given = OPTIONS | options
    fresh, engine = Engine.load(directory, **given), Engine.load(tiny, **given)
    engine.update_weights(directory)
    assert told(engine.generate([LONG[:300]], DRAWS)) == told(fresh.generate([LONG[:300]], DRAWS))
    assert engine._loaded.store is not None
    decoder, weights = engine._loop.model._decoder, engine._loaded.store.weights
    assert torch.equal(decoder.embed, weights.embed.to(decoder.embed.dtype)), "what a GPU's decode steps read"


def _without(tensors: Tensors, engine: Engine) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, tensor) for name, tensor in tensors.items() if name != "layers.2.attn.wq_b.weight")


def _misshapen(tensors: Tensors, engine: Engine) -> Iterator[tuple[str, Tensor]]:
    yield from (tensors | {"layers.2.attn.wq_b.weight": torch.zeros(3, 3)}).items()


def _no_tensor(tensors: Tensors, engine: Engine) -> Iterator[tuple[str, Tensor]]:
    yield from (tensors | {"layers.2.attn.wq_b.weight": [1.0]}).items()  # type: ignore[dict-item]


def _not_finite(tensors: Tensors, engine: Engine) -> Iterator[tuple[str, Tensor]]:
    bad = tensors["layers.2.attn.wq_b.weight"].clone()
    bad[1, 1] = float("nan")
    yield from (tensors | {"layers.2.attn.wq_b.weight": bad}).items()


def _twice(tensors: Tensors, engine: Engine) -> Iterator[tuple[str, Tensor]]:
    yield from tensors.items()
    yield "layers.2.attn.wq_b.weight", tensors["layers.2.attn.wq_b.weight"]


def _unknown(tensors: Tensors, engine: Engine) -> Iterator[tuple[str, Tensor]]:
    yield from tensors.items()
    yield "layers.2.attn.wq_c.weight", torch.zeros(1)


def _of_integers(tensors: Tensors, engine: Engine) -> Iterator[tuple[str, Tensor]]:
    yield from (tensors | {"layers.2.attn.wq_b.weight": tensors["layers.2.attn.wq_b.weight"].long()}).items()


def _no_such_expert(tensors: Tensors, engine: Engine) -> Iterator[tuple[str, Tensor]]:
    name = "layers.0.ffn.gate.tid2eid"
    yield from (tensors | {name: tensors[name] + engine.shape.num_experts}).items()


def _scales_missing(tensors: Tensors, engine: Engine) -> Iterator[tuple[str, Tensor]]:
    narrow = tensors["layers.2.attn.wq_b.weight"].to(torch.float8_e4m3fn)
    yield from (tensors | {"layers.2.attn.wq_b.weight": narrow}).items()


def _breaks_off(tensors: Tensors, engine: Engine) -> Iterator[tuple[str, Tensor]]:
    yield from list(tensors.items())[:40]
    raise OSError("the trainer is gone")


FAULTS = {
    _without: "lacks tensor layers.2.attn.wq_b.weight",
    _misshapen: r"layers.2.attn.wq_b.weight is \[3, 3\]",
    _no_tensor: "layers.2.attn.wq_b.weight is of type list, not a tensor",
    _not_finite: "layers.2.attn.wq_b.weight holds 1 values",
    _twice: "layers.2.attn.wq_b.weight comes twice",
    _unknown: "layers.2.attn.wq_c.weight is not part",
    _of_integers: "layers.2.attn.wq_b.weight is int64",
    _no_such_expert: "layers.0.ffn.gate.tid2eid names expert",
    _scales_missing: "layers.2.attn.wq_b.weight came without its scales",
    _breaks_off: "the trainer is gone",
}


def test_a_fault_is_named_and_changes_nothing(engine: Engine, trained: Tensors, directory: Path) -> None:
    before = told(engine.generate([LONG], DRAWS))
    for fault, sentence in FAULTS.items():
        with pytest.raises((CheckpointError, OSError), match=sentence):
            engine.update_weights(fault(trained, engine))
    with pytest.raises(CheckpointError, match="no checkpoint directory"):
        engine.update_weights(directory / "nowhere")
    outs = engine.generate([LONG], DRAWS)
    assert told(outs) == before
    assert outs[0].usage.cached_tokens > 500, "the cache is still good"
    assert engine.stats().weights == 0


def test_a_checkpoint_of_another_shape_is_refused(engine: Engine, tmp_path: Path) -> None:
    from triptych.checkpoint import synthesize

    other = replace(engine.shape, moe_intermediate_size=2 * engine.shape.moe_intermediate_size)
    synthesize(tmp_path / "other", other)
    with pytest.raises(CheckpointError, match="moe_intermediate_size"):
        engine.update_weights(tmp_path / "other")


def test_not_while_a_stream_is_open(engine: Engine, directory: Path) -> None:
    stream = engine.stream(LONG, GREEDY)
    next(stream)
    with pytest.raises(RequestError, match="answering"):
        engine.update_weights(directory)
    stream.close()
    engine.update_weights(directory)


# ---- while requests run


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> LoadedEngine:
    return load(tiny, EngineConfig.from_options(**OPTIONS))


@pytest.fixture(scope="module")
def staged(loaded: LoadedEngine, directory: Path) -> Staged:
    return stage(loaded, directory)


@pytest.fixture
def started(loaded: LoadedEngine, tiny: Path, staged: Staged, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs a scenario on a started engine that has the bundled weights again. The new ones are staged already, so that
    the requests of a test do not end before their turn comes."""
    Engine(loaded).update_weights(tiny)
    monkeypatch.setattr(async_engine, "stage", lambda engine, source: staged)
    first = loaded.loop.scheduler.weights

    def run(scenario: Any) -> None:
        async def main() -> None:
            engine = AsyncEngine(loaded)
            await engine.start()
            try:
                await scenario(engine, first)
            finally:
                await engine.resume()
                assert await engine.drain(20.0)

        asyncio.run(asyncio.wait_for(main(), 120))

    yield run
    assert not loaded.loop.busy and not loaded.loop.live
    loaded.loop.cache.check_integrity()


def long(count: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0.0, logprobs=0, ignore_eos=True, **more)


async def collect(engine: AsyncEngine, prompt: Any, params: SamplingParams, name: str) -> list[Delta]:
    return [delta async for delta in engine.stream(prompt, params, request_id=name)]


async def until_generating(engine: AsyncEngine, tokens: int = 5) -> None:
    start = engine.stats().generated_tokens
    while engine.stats().generated_tokens < start + tokens:
        await asyncio.sleep(0.005)


def tokens(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def logprobs(deltas: list[Delta]) -> list[float]:
    return [one.logprob for delta in deltas for one in delta.logprobs]


def continued(directory: Path, prompt: Any, count: int) -> tuple[list[int], list[float]]:
    """What an engine loaded from `directory` says after `prompt`."""
    engine = Engine.load(directory, **OPTIONS)
    [out] = engine.generate([prompt], long(count))
    engine.close()
    return list(out.token_ids), [one.logprob for one in out.logprobs]


def test_drained_requests_end_on_the_old_weights_and_later_ones_begin_on_the_new(
    started: Any, tiny: Path, directory: Path
) -> None:
    async def scenario(engine: AsyncEngine, first: int) -> None:
        early = asyncio.create_task(collect(engine, LONG, long(60), "early"))
        await until_generating(engine)
        update = asyncio.create_task(engine.update_weights(directory))
        while engine.stats().state != "updating":
            assert not early.done() and not update.done()
            await asyncio.sleep(0.002)
        late = asyncio.create_task(collect(engine, LONG, long(8), "late"))
        gone = asyncio.create_task(collect(engine, LONG, long(8), "gone"))
        await asyncio.sleep(0.01)
        gone.cancel()
        old, done, new = await early, await update, await late
        assert done.version == first + 1 and (done.aborted, done.recomputed) == (0, 0)
        assert (tokens(old), logprobs(old)) == continued(tiny, LONG, 60)
        assert (tokens(new), logprobs(new)) == continued(directory, LONG, 8)
        assert new[-1].usage is not None and new[-1].usage.cached_tokens == 0
        assert old[-1].usage is not None and old[-1].usage.completion_by_weights == {first: 60}
        assert engine.stats().state == "running" and engine.stats().weights == first + 1

    started(scenario)


def test_aborted_requests_end_at_once_with_what_they_have(started: Any, directory: Path) -> None:
    async def scenario(engine: AsyncEngine, first: int) -> None:
        runs = [asyncio.create_task(collect(engine, LONG, long(3000), f"r{i}")) for i in range(3)]
        await until_generating(engine)
        done = await engine.update_weights(directory, running="abort")
        assert done.aborted == 3
        for run in runs:
            last = (await run)[-1]
            assert last.finish_reason is FinishReason.ABORT and last.error is not None and "weights" in last.error

    started(scenario)


def test_recomputed_requests_keep_their_tokens_and_go_on_with_the_new_weights(
    started: Any, tiny: Path, directory: Path
) -> None:
    async def scenario(engine: AsyncEngine, first: int) -> None:
        runs = [asyncio.create_task(collect(engine, LONG[:n], long(80), f"r{n}")) for n in (700, 300)]
        await until_generating(engine, 20)
        done = await engine.update_weights(directory, running="recompute")
        assert done.recomputed == 2
        for run, n in zip(runs, (700, 300), strict=True):
            deltas = await run
            usage = deltas[-1].usage
            assert usage is not None
            by = dict(usage.completion_by_weights)
            assert set(by) == {first, first + 1} and sum(by.values()) == 80
            cut, said = by[first], tokens(deltas)
            assert (said[:cut], logprobs(deltas)[:cut]) == continued(tiny, LONG[:n], cut)
            rest = continued(directory, [*LONG[:n].tolist(), *said[:cut]], 80 - cut)
            assert (said[cut:], logprobs(deltas)[cut:]) == rest

    started(scenario)


def test_a_drain_that_takes_too_long_leaves_everything_as_it_was(started: Any, tiny: Path, directory: Path) -> None:
    async def scenario(engine: AsyncEngine, first: int) -> None:
        run = asyncio.create_task(collect(engine, LONG, long(150), "r"))
        await until_generating(engine)
        with pytest.raises(Unavailable, match="still running"):
            await engine.update_weights(directory, timeout=0.01)
        late = await collect(engine, LONG[:300], long(4), "late")
        assert (tokens(late), logprobs(late)) == continued(tiny, LONG[:300], 4)
        assert len(tokens(await run)) == 150
        assert engine.stats().weights == first

    started(scenario)


def test_one_update_at_a_time_and_only_of_a_known_kind(started: Any, directory: Path) -> None:
    async def scenario(engine: AsyncEngine, first: int) -> None:
        run = asyncio.create_task(collect(engine, LONG, long(80), "r"))
        await until_generating(engine)
        update = asyncio.create_task(engine.update_weights(directory))
        await asyncio.sleep(0.01)
        with pytest.raises(Unavailable, match="under way"):
            await engine.update_weights(directory)
        with pytest.raises(ConfigError, match="recompute"):
            await engine.update_weights(directory, running="recompile")  # type: ignore[arg-type]
        await run
        assert (await update).version == first + 1

    started(scenario)


def test_paused_requests_wait_and_go_on_where_they_were(started: Any, tiny: Path) -> None:
    async def scenario(engine: AsyncEngine, first: int) -> None:
        run = asyncio.create_task(collect(engine, LONG, long(40), "r"))
        await until_generating(engine)
        await engine.pause()
        steps = engine.stats().steps
        late = asyncio.create_task(collect(engine, LONG[:300], long(4), "late"))
        await asyncio.sleep(0.2)
        stats = engine.stats()
        assert (stats.state, stats.steps, stats.running, stats.waiting) == ("paused", steps, 1, 1)
        with pytest.raises(Unavailable, match="paused"):
            await engine.update_weights(tiny)
        await engine.resume()
        deltas = await run
        assert (tokens(deltas), logprobs(deltas)) == continued(tiny, LONG, 40)
        assert len(tokens(await late)) == 4

    started(scenario)


def test_an_update_in_a_pause_leaves_it_paused(started: Any, directory: Path) -> None:
    async def scenario(engine: AsyncEngine, first: int) -> None:
        run = asyncio.create_task(collect(engine, LONG[:300], long(20), "r"))
        await until_generating(engine, 3)
        await engine.pause()
        done = await engine.update_weights(directory, running="recompute")
        assert done.recomputed == 1 and engine.stats().state == "paused"
        run.cancel()
        await asyncio.sleep(0.05)
        await engine.resume()
        new = await collect(engine, LONG[:300], long(4), "new")
        assert (tokens(new), logprobs(new)) == continued(directory, LONG[:300], 4)

    started(scenario)
