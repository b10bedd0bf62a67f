"""Shapes and settings: read once, validated here, frozen ever after.

`ModelShape` comes from either dialect of config.json: the official one (`compress_ratios`) or the one that
Transformers writes (`layer_types`, nested `rope_parameters`). Source: DeepSeek-V4 config.json, report section 4.2.1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from triptych.errors import ConfigError, nearest

PAGE = 128  # tokens of a page: the smallest span in which both compressors close their groups, lcm(4, 128)
WINDOW = 128  # rows a query sees through the sliding window, itself included
CSA_RATIO = 4
HCA_RATIO = 128
SWA_LAYER, CSA_LAYER, HCA_LAYER = 0, CSA_RATIO, HCA_RATIO

_LAYER_TYPES = {
    "sliding_attention": SWA_LAYER,
    "compressed_sparse_attention": CSA_LAYER,
    "heavily_compressed_attention": HCA_LAYER,
}


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN scaling of the compress rope (reference section 2.4); no mscale."""

    factor: float = 16.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_max_position: int = 65536


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Geometry of one DeepSeek-V4 checkpoint. `ratios[l]` is 0 (SWA), 4 (CSA) or 128 (HCA) for backbone layer l."""

    vocab_size: int
    hidden_size: int
    ratios: tuple[int, ...]
    num_heads: int
    head_dim: int
    rope_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    index_heads: int
    index_head_dim: int
    index_topk: int
    num_experts: int
    experts_per_token: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling: float
    swiglu_limit: float = 10.0
    num_shared_experts: int = 1
    num_mtp_layers: int = 1
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    yarn: Yarn | None = None
    max_position: int = 1048576
    bos_id: int = 0
    eos_ids: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        _check_shape(self)

    @property
    def num_layers(self) -> int:
        """Backbone layers, without MTP."""
        return len(self.ratios)

    @property
    def csa_layers(self) -> tuple[int, ...]:
        """Indices of the CSA layers."""
        return tuple(i for i, r in enumerate(self.ratios) if r == CSA_LAYER)

    @property
    def hca_layers(self) -> tuple[int, ...]:
        """Indices of the HCA layers."""
        return tuple(i for i, r in enumerate(self.ratios) if r == HCA_LAYER)

    def is_hash_layer(self, layer: int) -> bool:
        """True if `layer` routes by token id; the MTP block (layer = num_layers) never does."""
        return layer < min(self.num_hash_layers, self.num_layers)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, source: str = "config.json") -> ModelShape:
        """The shape of a parsed config.json in either dialect. Raises ConfigError naming the key."""
        return _shape_from_dict(raw, source)

    @classmethod
    def from_file(cls, path: Path) -> ModelShape:
        """The shape in the config.json at `path`."""
        return cls.from_dict(read_config(path), source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """An official-dialect config.json that `from_dict` and Transformers both read."""
        return _shape_to_dict(self)

    def to_transformers_dict(self) -> dict[str, Any]:
        """A config.json in the words of Transformers 5.23: layer types by name and nested rope parameters."""
        return _shape_to_transformers(self)


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object at `path`. Raises ConfigError if it is missing or not an object."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"There is no {path.name} in {path.parent}.", "Point at a checkpoint directory.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no JSON object.")
    return raw


# official key -> field, for values that carry over as they are
_PLAIN_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "head_dim": "head_dim",
    "q_lora_rank": "q_lora_rank",
    "o_groups": "o_groups",
    "o_lora_rank": "o_lora_rank",
    "index_n_heads": "index_heads",
    "index_head_dim": "index_head_dim",
    "index_topk": "index_topk",
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "moe_intermediate_size": "moe_intermediate_size",
    "routed_scaling_factor": "routed_scaling",
}
_OPTIONAL_KEYS = {
    "swiglu_limit": "swiglu_limit",
    "n_shared_experts": "num_shared_experts",
    "num_nextn_predict_layers": "num_mtp_layers",
    "hc_mult": "hc_mult",
    "hc_sinkhorn_iters": "hc_sinkhorn_iters",
    "hc_eps": "hc_eps",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "compress_rope_theta": "compress_rope_theta",
    "max_position_embeddings": "max_position",
    "bos_token_id": "bos_id",
}
# settings of which only one value exists in the family; another value means another architecture
_FIXED = {
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "num_key_value_heads": 1,
    "sliding_window": WINDOW,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
}
_YARN_KEYS = {
    "factor": "factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "original_max_position_embeddings": "original_max_position",
}


def _shape_from_dict(raw: Mapping[str, Any], source: str) -> ModelShape:
    if raw.get("model_type", "deepseek_v4") != "deepseek_v4":
        raise ConfigError(f"{source}: model_type {raw['model_type']!r} is not deepseek_v4; only DeepSeek-V4 is served.")
    for key, value in _FIXED.items():
        if raw.get(key) not in (value, None):
            raise ConfigError(f"{source}: {key} is {raw[key]!r}, but DeepSeek-V4 has {value!r}.")
    values: dict[str, Any] = {}
    for key, name in _PLAIN_KEYS.items():
        if raw.get(key) is None:
            raise ConfigError(f"{source} lacks {key!r}.", nearest(key, raw))
        values[name] = raw[key]
    values |= {name: raw[key] for key, name in _OPTIONAL_KEYS.items() if raw.get(key) is not None}
    layers = raw.get("num_hidden_layers")
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
        raise ConfigError(f"{source}: num_hidden_layers must be a positive integer, not {layers!r}.")
    values["ratios"] = _ratios(raw, layers, source)
    values["rope_dim"] = _rope_dim(raw, source)
    values["num_hash_layers"] = _hash_layers(raw, layers, source)
    values |= _rope(raw, source)
    eos = raw.get("eos_token_id", 1)
    values["eos_ids"] = tuple(eos) if isinstance(eos, list) else (eos,)
    try:
        return ModelShape(**values)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{source}: {error}") from None


def _typed(raw: Mapping[str, Any], key: str, kind: type, source: str) -> Any:
    """raw[key] if it is a `kind`; an empty one if the key is absent or null. ConfigError otherwise."""
    value = raw.get(key)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise ConfigError(f"{source}: {key} is {value!r}, but must be a {'list' if kind is list else 'JSON object'}.")
    return value


def _kinds(raw: Mapping[str, Any], key: str, known: Collection[str], source: str) -> list[str]:
    """The list of names at `key`, each of them known."""
    names = _typed(raw, key, list, source)
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise ConfigError(f"{source}: unknown kind {name!r} in {key}.", nearest(str(name), known))
    return list(names)


def _ratios(raw: Mapping[str, Any], layers: int, source: str) -> tuple[int, ...]:
    """Layer kinds from `layer_types` or `compress_ratios`; the latter has extra entries for MTP blocks."""
    for name, rate in _typed(raw, "compress_rates", dict, source).items():
        if _LAYER_TYPES.get(name) != rate:
            raise ConfigError(f"{source}: compress_rates says {name!r}: {rate!r}; only ratios 4 and 128 exist.")
    ratios = [_LAYER_TYPES[name] for name in _kinds(raw, "layer_types", _LAYER_TYPES, source)]
    ratios = ratios or _typed(raw, "compress_ratios", list, source)
    if not ratios:
        raise ConfigError(f"{source} has neither 'compress_ratios' nor 'layer_types'.")
    if len(ratios) < layers:
        raise ConfigError(f"{source}: {len(ratios)} layer kinds for {layers} layers.")
    return tuple(ratios[:layers])


def _rope_dim(raw: Mapping[str, Any], source: str) -> Any:
    if raw.get("qk_rope_head_dim") is not None:
        return raw["qk_rope_head_dim"]
    main = _typed(_typed(raw, "rope_parameters", dict, source), "main", dict, source)
    factor = raw.get("partial_rotary_factor", main.get("partial_rotary_factor"))
    if not isinstance(factor, int | float) or not isinstance(raw["head_dim"], int):
        raise ConfigError(f"{source} has neither 'qk_rope_head_dim' nor a number 'partial_rotary_factor'.")
    return round(raw["head_dim"] * factor)


def _hash_layers(raw: Mapping[str, Any], layers: int, source: str) -> Any:
    """How many layers route by token id; Transformers lists the kind of each."""
    kinds = _kinds(raw, "mlp_layer_types", ("hash_moe", "moe"), source)[:layers]
    if not kinds:
        count = raw.get("num_hash_layers", 3)
        return min(count, layers) if isinstance(count, int) else count
    hashed = kinds.count("hash_moe")
    if "hash_moe" in kinds[hashed:]:
        raise ConfigError(f"{source}: hash_moe layers must come first in mlp_layer_types.")
    return hashed


def _rope(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Thetas and YaRN from official `rope_scaling` or Transformers' `rope_parameters`, flat or by kind of layer."""
    nested = _typed(raw, "rope_parameters", dict, source)
    scaling = _typed(raw, "rope_scaling", dict, source)
    out: dict[str, Any] = {}
    if "compress" in nested:
        scaling, main = _typed(nested, "compress", dict, source), _typed(nested, "main", dict, source)
        if main.get("rope_type", "default") != "default":
            raise ConfigError(f"{source}: rope_parameters.main is {main['rope_type']!r}, but plain rope is 'default'.")
        thetas = {"rope_theta": main.get("rope_theta"), "compress_rope_theta": scaling.get("rope_theta")}
        out = {name: theta for name, theta in thetas.items() if theta is not None}
    elif nested:
        scaling = nested
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "yarn":
        out["yarn"] = _yarn(scaling, source)
    elif kind != "default":
        raise ConfigError(f"{source}: rope type {kind!r} is not known; DeepSeek-V4 uses 'yarn' or 'default'.")
    return out


def _yarn(scaling: Mapping[str, Any], source: str) -> Yarn:
    for key, value in (("attention_factor", 1), ("truncate", True)):
        if scaling.get(key, value) not in (value, None):
            raise ConfigError(f"{source}: yarn has {key} {scaling[key]!r}, but DeepSeek-V4 has {value}.")
    values = {name: scaling[key] for key, name in _YARN_KEYS.items() if scaling.get(key) is not None}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(f"{source}: yarn {name} must be a positive number, not {value!r}.")
    return Yarn(**values)


def _shape_to_dict(shape: ModelShape) -> dict[str, Any]:
    inverse = {name: key for key, name in (_PLAIN_KEYS | _OPTIONAL_KEYS).items()}
    plain = {inverse[name]: value for name, value in asdict(shape).items() if name in inverse}
    eos = shape.eos_ids[0] if len(shape.eos_ids) == 1 else list(shape.eos_ids)
    out = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        **plain,
        "num_hidden_layers": shape.num_layers,
        "compress_ratios": [*shape.ratios, *([SWA_LAYER] * shape.num_mtp_layers)],
        "num_hash_layers": shape.num_hash_layers,
        "qk_rope_head_dim": shape.rope_dim,
        "eos_token_id": eos,
        **_FIXED,
    }
    if shape.yarn is not None:
        out["rope_scaling"] = {"type": "yarn"} | {key: getattr(shape.yarn, name) for key, name in _YARN_KEYS.items()}
    return out


def _shape_to_transformers(shape: ModelShape) -> dict[str, Any]:
    """Beside what is converted here, Transformers takes the official keys."""
    out = _shape_to_dict(shape)
    scaling = out.pop("rope_scaling", None)
    for key in ("compress_ratios", "num_hash_layers"):
        del out[key]
    names = {ratio: name for name, ratio in _LAYER_TYPES.items()}
    factor = shape.rope_dim / shape.head_dim
    if int(shape.head_dim * factor) < shape.rope_dim:  # which is how it comes back
        factor = math.nextafter(factor, 1.0)
    compress: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        compress = {**scaling, "rope_type": "yarn", "attention_factor": 1.0}
    out["layer_types"] = [names[ratio] for ratio in shape.ratios]
    out["mlp_layer_types"] = ["hash_moe" if shape.is_hash_layer(i) else "moe" for i in range(shape.num_layers)]
    out["compress_rates"] = {name: ratio for name, ratio in _LAYER_TYPES.items() if ratio != SWA_LAYER}
    out["partial_rotary_factor"] = factor
    out["rope_parameters"] = {
        "main": {"rope_type": "default", "rope_theta": shape.rope_theta, "partial_rotary_factor": factor},
        "compress": {**compress, "rope_theta": shape.compress_rope_theta, "partial_rotary_factor": factor},
    }
    return out


def _check_shape(shape: ModelShape) -> None:
    _check_numbers(shape)
    if not shape.ratios:
        raise ConfigError("A model needs at least one layer.")
    bad = [r for r in shape.ratios if type(r) is not int or r not in (SWA_LAYER, CSA_LAYER, HCA_LAYER)]
    if bad:
        raise ConfigError(f"compress_ratios holds {bad[0]!r}; only 0, 4 and 128 exist.")
    if not shape.eos_ids or any(type(token) is not int or token < 0 for token in shape.eos_ids):
        raise ConfigError(f"eos_token_id must be a token id or a list of them, not {list(shape.eos_ids)!r}.")
    if shape.num_heads % shape.o_groups:
        raise ConfigError(f"num_attention_heads {shape.num_heads} is no multiple of o_groups {shape.o_groups}.")
    if shape.rope_dim % 2 or not shape.rope_dim <= min(shape.head_dim, shape.index_head_dim):
        raise ConfigError(f"qk_rope_head_dim {shape.rope_dim} must be even and fit head_dim and index_head_dim.")
    if (picks := shape.experts_per_token) > shape.num_experts:
        raise ConfigError(f"num_experts_per_tok {picks} exceeds n_routed_experts {shape.num_experts}.")
    if shape.num_shared_experts != 1:
        raise ConfigError(f"n_shared_experts is {shape.num_shared_experts}, but DeepSeek-V4 has 1.")


def _check_numbers(shape: ModelShape) -> None:
    """Every plain field is a number of its type and range; errors name the key of config.json."""
    keys = {name: key for key, name in (_PLAIN_KEYS | _OPTIONAL_KEYS).items()} | {"rope_dim": "qk_rope_head_dim"}
    for item in fields(shape):
        value = getattr(shape, item.name)
        key = keys.get(item.name, item.name)
        if item.type == "int":
            low = 0 if item.name in ("num_hash_layers", "num_mtp_layers", "bos_id") else 1
            if type(value) is not int or value < low:
                raise ConfigError(f"{key} must be an integer of at least {low}, not {value!r}.")
        elif item.type == "float" and (type(value) not in (int, float) or not 0 < value < math.inf):
            raise ConfigError(f"{key} must be a positive number, not {value!r}.")


_FLASH = ModelShape(
    vocab_size=129280,
    hidden_size=4096,
    ratios=(SWA_LAYER, SWA_LAYER, *(CSA_LAYER, HCA_LAYER) * 20, CSA_LAYER),
    num_heads=64,
    head_dim=512,
    rope_dim=64,
    q_lora_rank=1024,
    o_groups=8,
    o_lora_rank=1024,
    index_heads=64,
    index_head_dim=128,
    index_topk=512,
    num_experts=256,
    experts_per_token=6,
    moe_intermediate_size=2048,
    num_hash_layers=3,
    routed_scaling=1.5,
    yarn=Yarn(),
)
_PRO = replace(
    _FLASH,
    hidden_size=7168,
    ratios=(HCA_LAYER, HCA_LAYER, *(CSA_LAYER, HCA_LAYER) * 29, CSA_LAYER),
    num_heads=128,
    q_lora_rank=1536,
    o_groups=16,
    index_topk=1024,
    num_experts=384,
    moe_intermediate_size=3072,
    routed_scaling=2.5,
)
SHAPES = {"flash": _FLASH, "pro": _PRO}
"""The released models, as their config.json describes them (reference section 1.1)."""

KvFormat = Literal["float32", "bfloat16", "fp8"]
IndexFormat = Literal["float32", "bfloat16", "fp8", "mxfp4"]
Numerics = Literal["exact", "native"]
Device = Literal["auto", "cpu", "cuda"]
KernelBackend = Literal["auto", "ref", "cpu", "triton", "vendor"]


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """How much memory the caches get and how it is used. Sizes in bytes. `index_format` None means as `kv_format`.

    `kv_memory` None means a quarter of the free RAM, or most of what a GPU has left beside the weights. `policy` says
    which page boundaries get a snapshot (see cache/places.py), `retention` what is given up first ("value" or "lru").
    `host_memory` and `disk` (a directory of at most `disk_memory`) hold what the device gave up; `remote` is a
    redis:// address. `ttl`: seconds without use after which what a request cached goes first, where it does not say.
    `tenant_quota`: the share of the cache that a tenant may take while others want room; `tenant_shares`: others, by
    salt. `canary`: the share of resumed requests that are computed again in idle time and compared.
    """

    kv_memory: int | None = None
    kv_format: KvFormat = "float32"
    index_format: IndexFormat | None = None
    prefix_cache: bool = True
    policy: str = "adaptive"
    retention: Literal["value", "lru"] = "value"
    ttl: float | None = None
    host_memory: int = 0
    disk: str | None = None
    disk_memory: int = 64 << 30
    remote: str | None = None
    tenant_quota: float = 1.0
    tenant_shares: Mapping[str, float] = field(default_factory=dict)
    canary: float = 0.0

    def __post_init__(self) -> None:
        if self.kv_memory is not None and self.kv_memory < 1:
            raise ConfigError(f"kv_memory must be positive, not {self.kv_memory}.")
        if self.host_memory < 0:
            raise ConfigError(f"host_memory must not be negative, as {self.host_memory} is.")
        if self.disk_memory < 1:
            raise ConfigError(f"disk_memory must be positive, not {self.disk_memory}.")
        if self.ttl is not None and not 0.0 < self.ttl < math.inf:
            raise ConfigError(f"ttl must be a positive number of seconds, not {self.ttl}.")
        if not 0.0 < self.tenant_quota <= 1.0:
            raise ConfigError(f"tenant_quota must be a share above 0 and at most 1, not {self.tenant_quota}.")
        if not 0.0 <= self.canary <= 1.0:
            raise ConfigError(f"canary must be a share from 0 to 1, not {self.canary}.")
        if self.canary and self.policy == "bounded":
            raise ConfigError("The canary would report what policy bounded allows.", "Choose one of the two.")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How the engine runs. Unknown options are errors; see `EngineConfig.from_options`.

    `max_running` requests own a window slot at once; `step_tokens` rows at most run in one step (None: 512 on a
    processor, 8,192 on a GPU); `max_context` tokens at most belong to one request (None: what the model allows);
    `deterministic` makes logits bitwise independent of batch mates, chunking and cache path; `device` "auto" is the
    first NVIDIA GPU that can, else the processor.
    """

    max_running: int = 16
    max_waiting: int = 1024
    step_tokens: int | None = None
    max_context: int | None = None
    numerics: Numerics = "exact"
    weight_dtype: Literal["float32", "bfloat16", "released"] = "float32"
    deterministic: bool = False
    threads: int | None = None
    kernel_backend: KernelBackend = "auto"
    device: Device = "auto"
    cache: CacheConfig = CacheConfig()

    def __post_init__(self) -> None:
        for name in ("max_running", "max_waiting", "step_tokens", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}.")
        if self.device not in get_args(Device):
            raise ConfigError(f"device must be auto, cpu or cuda, not {self.device!r}.")
        if self.step_tokens is not None and self.step_tokens < self.max_running:
            raise ConfigError(
                f"step_tokens {self.step_tokens} is below max_running {self.max_running}.",
                "Each running request decodes one token a step: raise step_tokens or lower max_running.",
            )
        if self.max_context is not None and self.max_context < 2:
            raise ConfigError(f"max_context must be at least 2, not {self.max_context}.")

    @classmethod
    def from_options(cls, **options: Any) -> EngineConfig:
        """Options of engine and cache by name, flat. An unknown one is an error that names the nearest."""
        cache_names = {f.name for f in fields(CacheConfig)}
        own_names = {f.name for f in fields(cls)} - {"cache"}
        for name in sorted(options.keys() - cache_names - own_names):
            raise ConfigError(f"Unknown option {name!r}.", nearest(name, cache_names | own_names))
        cache = CacheConfig(**{k: v for k, v in options.items() if k in cache_names})
        return cls(**{k: v for k, v in options.items() if k in own_names}, cache=cache)
