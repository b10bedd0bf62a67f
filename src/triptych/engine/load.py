"""From a model's name to a ready EngineLoop: find the checkpoint, plan the memory, load, compile."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from triptych import tiny
from triptych.cache.geometry import CacheCapacity, CacheGeometry, plan_capacity
from triptych.cache.manager import CacheManager
from triptych.cache.places import snapshot_policy_named
from triptych.cache.policies import Below, Policies
from triptych.cache.retention import retention_named
from triptych.checkpoint import CheckpointReader, fingerprint
from triptych.config import EngineConfig, ModelShape
from triptych.engine.canary import Canary
from triptych.engine.device import device_for, free_device_memory, kernels_for, kind_of, with_defaults
from triptych.engine.gpu_mover import GpuMover
from triptych.engine.loop import EngineLoop
from triptych.engine.masks import Masks
from triptych.engine.memory import free_memory
from triptych.engine.mover import Mover
from triptych.engine.options import options_of
from triptych.engine.pools import Pools
from triptych.engine.profiles import profile_named
from triptych.engine.rates import starting_rates
from triptych.engine.room import room_for_caches
from triptych.engine.runner import DeviceRunner, Runner
from triptych.engine.stores import namespace, open_stores
from triptych.engine.warmup import prepare, warm_up
from triptych.errors import CheckpointError, ConfigError, nearest, reason_of
from triptych.kernels import parallel
from triptych.kernels.gpu import is_hopper
from triptych.model.weights import ModelWeights, Storage, WeightStore
from triptych.schedule.scheduler import Scheduler
from triptych.text.grammar import GrammarCache
from triptych.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

BUNDLED = ("tiny",)
_MOST_THREADS = 1024  # each would be one of this process
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "fp8": 0.5}
"""How far logits may lie apart because rows were batched otherwise; a wrong window moves them by more than 1."""

_DTYPES: dict[str, Storage] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "released": "released"}


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """Everything an engine consists of; `banner` says in a few lines what was loaded and planned.

    `store` knows where each tensor of the weights lies; without it they cannot be replaced.
    """

    name: str
    shape: ModelShape
    config: EngineConfig
    tokenizer: Tokenizer | None
    loop: EngineLoop
    max_context: int
    banner: str
    store: WeightStore | None = None


def load_with(model: str | Path, options: Mapping[str, Any]) -> LoadedEngine:
    """Load `model` with options by name; `profile` among them gives those that are not there. Raises as `load`."""
    given = options_of(options)
    name = given.pop("profile", None)
    if name is None:
        return load(model, EngineConfig.from_options(**given))
    profile = profile_named(name)
    chosen = profile.on(kind_of(device_for(EngineConfig(device=given.get("device", "auto")))))
    loaded = load(model, EngineConfig.from_options(**chosen | given))
    told = [f"{key} {value}" + (" (as given)" if key in given else "") for key, value in (chosen | given).items()]
    return replace(loaded, banner=f"{loaded.banner}\nProfile  {profile.name}: {', '.join(told)}")


def load(model: str | Path, config: EngineConfig) -> LoadedEngine:
    """Load `model`, a checkpoint directory or a bundled name. Raises ConfigError or CheckpointError."""
    name, directory = _find(model)
    reader = CheckpointReader(directory)
    shape = reader.shape
    geometry = CacheGeometry.of(shape, config.cache.kv_format, config.cache.index_format)
    device = device_for(config)
    config = with_defaults(config, device)
    _refuse_too_much(reader, config, device)
    if config.weight_dtype == "released":
        _refuse_released(config)
    store = WeightStore(shape, _DTYPES[config.weight_dtype], mtp=reader.has_mtp, device=device)
    fill(store, reader)
    arrange(store, config)
    weights = store.weights
    memory = _cache_memory(weights, config, geometry)
    capacity = plan_capacity(geometry, memory, config.max_running)
    _set_threads(config, device)
    if kind_of(device) == "cpu":  # Triton compiles for the sizes of the model itself, so a miniature would not help
        with Console(stderr=True).status("Preparing kernels (the first start compiles them, half a minute)"):
            warm_up(config)
    loop = build_loop(weights, config, geometry, capacity, fingerprint(directory))
    limit = config.max_context or shape.max_position
    max_context = min(limit, shape.max_position, capacity.tokens)
    tokenizer = _tokenizer(directory, shape)
    if tokenizer is not None:
        loop.masks = Masks(GrammarCache(tokenizer, shape.vocab_size, shape.eos_ids))
    banner = _banner(name, weights, capacity.describe(geometry), max_context)
    return LoadedEngine(name, shape, config, tokenizer, loop, max_context, banner, store)


def build_loop(
    weights: ModelWeights, config: EngineConfig, geometry: CacheGeometry, capacity: CacheCapacity, identity: bytes = b""
) -> EngineLoop:
    """The engine's parts around given weights, on their device. `identity` names the weights on disk."""
    shape, wanted = weights.shape, config.cache
    places = snapshot_policy_named(wanted.policy)
    if not places.exact:
        logger.warning("cache policy %s is approximate: answers may depend on what was cached", places.name)
    vendors = [row.op for row in kernels_for(config, weights.embed.device) if row.backend == "vendor"]
    space = namespace(identity, geometry, config, exact=places.exact, vendors=vendors)
    stores = open_stores(wanted, space)
    host_frames = wanted.host_memory // geometry.page_bytes
    below = Below(host_frames, stores)
    policies = Policies(
        places,
        retention_named(wanted.retention),
        starting_rates(shape, config, weights.embed.device),
        quota=wanted.tenant_quota,
        shares=wanted.tenant_shares,
        prefix_cache=wanted.prefix_cache,
        ttl=wanted.ttl,
    )
    cache = CacheManager(
        geometry,
        capacity,
        shape.num_layers,
        policies=policies,
        below=below,
        namespace=space,
    )
    runner = _runner(weights, config, geometry, capacity)
    pools = runner.pools
    mover = (Mover if kind_of(pools.device) == "cpu" else GpuMover)(pools, geometry, host_frames, stores)
    canary = Canary(wanted.canary, _TOLERANCE[wanted.kv_format]) if wanted.canary else None
    scheduler = Scheduler(cache, config, shape.max_position, runner.depth)
    return EngineLoop(shape, cache, scheduler, runner, mover, canary)


def _runner(weights: ModelWeights, config: EngineConfig, geometry: CacheGeometry, capacity: CacheCapacity) -> Runner:
    """The runner of the device that the weights are on; a GPU's is ready for every size of decode step."""
    device = weights.embed.device
    if kind_of(device) == "cpu":
        return Runner(weights, config, Pools(weights.shape, geometry, capacity, device))
    pools = Pools(weights.shape, geometry, capacity, device, spare=1)
    runner = DeviceRunner(weights, config, pools, capture=True)
    prepare(runner, config)
    return runner


def _find(model: str | Path) -> tuple[str, Path]:
    """Display name and directory of a model given by bundled name or path."""
    if not isinstance(model, str | os.PathLike):
        raise ConfigError(f"A model is a directory or a bundled name, not {model!r}.", f"Known: {', '.join(BUNDLED)}.")
    if str(model) in BUNDLED:
        try:
            return str(model), tiny.ensure_checkpoint()
        except OSError as error:
            raise ConfigError(f"The bundled checkpoint could not be written: {reason_of(error)}.") from None
    path = Path(os.path.expanduser(model))
    if path.is_dir():
        return path.resolve().name, path
    if path.exists():
        raise ConfigError(f"{path} is a file.", "Name the directory that holds config.json and the safetensors files.")
    hint = nearest(str(model), BUNDLED)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        hint = "Models are not downloaded: fetch the repository first and name its directory."
    raise ConfigError(f"There is no checkpoint directory {str(model)!r}.", hint)


def _cache_memory(weights: ModelWeights, config: EngineConfig, geometry: CacheGeometry) -> int:
    """Bytes for the caches: what was asked for, or a quarter of the RAM, or all that a GPU's steps leave of it."""
    device, wanted = weights.embed.device, config.cache.kv_memory
    if kind_of(device) == "cpu":
        return wanted or free_device_memory(device) // 4
    room = room_for_caches(weights, config, geometry)
    if wanted and wanted > room:
        raise ConfigError(
            f"The cache needs {wanted / 2**30:.1f} GiB, but beside weights and steps {room / 2**30:.1f} GiB are free.",
            "Lower --kv-memory, --step-tokens or --max-running.",
        )
    return wanted or room


def _refuse_too_much(reader: CheckpointReader, config: EngineConfig, device: torch.device) -> None:
    """ConfigError before anything is loaded: weights that a GPU cannot hold, caches that the RAM cannot."""
    free = free_device_memory(device)
    needed = config.cache.host_memory + (config.cache.kv_memory or free // 4)
    if kind_of(device) == "cuda":
        weights = WeightStore(reader.shape, _DTYPES[config.weight_dtype], mtp=reader.has_mtp, device="meta").nbytes
        if weights > free:
            raise ConfigError(
                f"The weights need {weights / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB of the GPU are free.",
                "Use --device cpu, or a GPU with more memory.",
            )
        needed, free = config.cache.host_memory, free_memory()
    if needed > free:
        raise ConfigError(
            f"The cache needs {needed / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB are free.",
            "Lower --kv-memory or --host-memory.",
        )


def fill(store: WeightStore, reader: CheckpointReader) -> None:
    """Place all tensors of a checkpoint. CheckpointError that names the first one that is missing or wrong."""
    if store.released:
        for raw in reader.raw_tensors(mtp=store.has_mtp):
            store.place(raw.spec.name, raw.data, raw.scale)
    else:
        for name, tensor in reader.tensors(dtype=torch.float32, mtp=store.has_mtp):
            store.place(name, tensor)
    check_complete(store)


def check_complete(store: WeightStore) -> None:
    """CheckpointError if a tensor was not placed."""
    missing = store.missing()
    if missing:
        raise CheckpointError(f"The checkpoint lacks tensor {missing[0]} ({len(missing)} in all).")


def arrange(store: WeightStore, config: EngineConfig) -> None:
    """Bring a filled store's weights into the form that the kernels read which `config` chooses.

    Deterministic mode has kernels for any GPU, which read MXFP4 as it is released.
    """
    if is_hopper(store.weights.embed.device) and not config.deterministic:
        store.put_in_tiles()


def _refuse_released(config: EngineConfig) -> None:
    """ConfigError where weights in the released formats cannot be multiplied."""
    if config.numerics != "native":
        raise ConfigError(
            "Released weights are multiplied by quantised inputs, which exact numerics do not have.",
            "Add --numerics native, or use --weight-dtype bfloat16.",
        )


def _set_threads(config: EngineConfig, device: torch.device) -> None:
    """Compiled kernels split their work over threads of their own; the reference leaves that to the library."""
    if (config.threads or 1) > _MOST_THREADS:
        raise ConfigError(f"threads must be at most {_MOST_THREADS:,}, not {config.threads}.", "One per core is best.")
    if any(row.backend == "cpu" for row in kernels_for(config, device)):
        parallel.set_threads(config.threads)
    elif config.threads is not None:
        torch.set_num_threads(config.threads)


def _bytes_of(weights: ModelWeights) -> int:
    """Rough weight bytes: embeddings, head and experts, which are nearly all of it."""
    experts = sum(layer.moe.experts.w13.nbytes + layer.moe.experts.w2.nbytes for layer in weights.layers)
    return weights.embed.nbytes + weights.head.nbytes + experts


def _tokenizer(directory: Path, shape: ModelShape) -> Tokenizer | None:
    """The checkpoint's own tokenizer, DeepSeek's if the vocabulary is DeepSeek's, or none (token ids only)."""
    if (directory / "tokenizer.json").is_file():
        return Tokenizer.from_directory(directory)
    if shape.vocab_size == 129280:
        return Tokenizer.deepseek()
    return None


def _banner(name: str, weights: ModelWeights, capacity: str, max_context: int) -> str:
    shape = weights.shape
    kinds = f"{len(shape.csa_layers)} CSA, {len(shape.hca_layers)} HCA"
    swa = shape.num_layers - len(shape.csa_layers) - len(shape.hca_layers)
    return (
        f"Model    {name}: {shape.num_layers} layers ({swa} SWA, {kinds}), weights about "
        f"{_bytes_of(weights) / 2**20:,.0f} MiB in {str(weights.embed.dtype).removeprefix('torch.')}\n"
        f"Cache    {capacity}\n"
        f"Context  up to {max_context:,} tokens per request"
    )
