"""One tensor, many spellings: the official names and what other writers make of them.

Inside Triptych a tensor has its official name (`layers.3.attn.wq_a.weight`). Files may spell it as Transformers'
modules do (`model.layers.3.self_attn.q_a_proj.weight`), as its `save_pretrained` does (that or a mixture, with `norm`
for each `kv_norm`), or as official names behind `model.` with self_attn, mlp and weight_scale_inv.
Source: reference sections 5.1 and 5.3; Transformers 5.23, conversion_mapping.py.
"""

from __future__ import annotations

import re

# (official, Transformers) spellings of what follows `layers.{l}.` without .weight or .scale
_BLOCK = (
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("hc_attn_fn", "attn_hc.fn"),
    ("hc_attn_base", "attn_hc.base"),
    ("hc_attn_scale", "attn_hc.scale"),
    ("hc_ffn_fn", "ffn_hc.fn"),
    ("hc_ffn_base", "ffn_hc.base"),
    ("hc_ffn_scale", "ffn_hc.scale"),
    ("attn.wq_a", "self_attn.q_a_proj"),
    ("attn.q_norm", "self_attn.q_a_norm"),
    ("attn.wq_b", "self_attn.q_b_proj"),
    ("attn.wkv", "self_attn.kv_proj"),
    ("attn.kv_norm", "self_attn.kv_norm"),
    ("attn.wo_a", "self_attn.o_a_proj"),
    ("attn.wo_b", "self_attn.o_b_proj"),
    ("attn.attn_sink", "self_attn.sinks"),
    ("attn.compressor.wkv", "self_attn.compressor.kv_proj"),
    ("attn.compressor.wgate", "self_attn.compressor.gate_proj"),
    ("attn.compressor.ape", "self_attn.compressor.position_bias"),
    ("attn.compressor.norm", "self_attn.compressor.kv_norm"),
    ("attn.indexer.wq_b", "self_attn.compressor.indexer.q_b_proj"),
    ("attn.indexer.weights_proj", "self_attn.compressor.indexer.scorer.weights_proj"),
    ("attn.indexer.compressor.wkv", "self_attn.compressor.indexer.kv_proj"),
    ("attn.indexer.compressor.wgate", "self_attn.compressor.indexer.gate_proj"),
    ("attn.indexer.compressor.ape", "self_attn.compressor.indexer.position_bias"),
    ("attn.indexer.compressor.norm", "self_attn.compressor.indexer.kv_norm"),
    ("ffn.gate", "mlp.gate"),
    ("ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
    ("ffn.gate.tid2eid", "mlp.gate.tid2eid"),
    ("ffn.shared_experts.w1", "mlp.shared_experts.gate_proj"),
    ("ffn.shared_experts.w2", "mlp.shared_experts.down_proj"),
    ("ffn.shared_experts.w3", "mlp.shared_experts.up_proj"),
)
_TOP = (
    ("embed", "model.embed_tokens"),
    ("head", "lm_head"),
    ("norm", "model.norm"),
    ("hc_head_fn", "model.hc_head.hc_fn"),
    ("hc_head_base", "model.hc_head.hc_base"),
    ("hc_head_scale", "model.hc_head.hc_scale"),
)
_TO_OFFICIAL = {theirs.removeprefix("model."): ours for ours, theirs in _BLOCK + _TOP}
# save_pretrained undoes a renaming of norm to kv_norm everywhere, also where there was none
_TO_OFFICIAL |= {theirs.replace("kv_norm", "norm"): ours for ours, theirs in _BLOCK if theirs.endswith("kv_norm")}
_TO_TRANSFORMERS = dict(_BLOCK + _TOP)
_BLOCK_NAME = re.compile(r"((?:layers|mtp)\.[0-9]+)\.(.+)", re.DOTALL)
_SUFFIX = re.compile(r"(.*?)(\.weight_scale_inv|\.weight|\.scale)?", re.DOTALL)

_MIXED = (
    (re.compile(r"^self_attn\."), "attn."),
    (re.compile(r"^mlp\."), "ffn."),
    (re.compile(r"^attn\.norm$"), "attn.kv_norm"),
    (re.compile(r"^ffn\.gate\.e_score_correction_bias$"), "ffn.gate.bias"),
)
"""Spellings of single parts that occur in any combination."""

FUSED = {"mlp.experts.gate_up_proj": ("w1", "w3"), "mlp.experts.down_proj": ("w2",)}
"""Transformers' stacked experts -> the official matrices of one expert, in row order: [E, rows, columns]."""


def official_name(stored: str) -> str:
    """The official spelling of a tensor name in any dialect; names that nobody knows come back nearly unchanged.

    Stacked experts keep their own name behind the layer: `layers.3.mlp.experts.gate_up_proj`.
    """
    name = stored.removeprefix("model.")
    match = _BLOCK_NAME.fullmatch(name)
    if match is None:
        return _official_stem(name)
    return f"{match[1]}.{_official_stem(match[2])}"


def _official_stem(name: str) -> str:
    match = _SUFFIX.fullmatch(name)
    assert match is not None  # every string matches
    stem, suffix = match[1], match[2] or ""
    suffix = ".scale" if suffix == ".weight_scale_inv" else suffix
    if name in _TO_OFFICIAL:  # attn_hc.scale ends like a block scale but is none
        return _TO_OFFICIAL[name]
    if stem in _TO_OFFICIAL:
        return _TO_OFFICIAL[stem] + suffix
    if stem.removesuffix("_scale_inv") in FUSED:
        return stem
    for pattern, ours in _MIXED:
        stem = pattern.sub(ours, stem)
    return stem + suffix


def transformers_name(official: str) -> str:
    """An official tensor's name among Transformers' parameters, which have no MTP; for experts see `fused_name`."""
    match = _BLOCK_NAME.fullmatch(official)
    lead, name = (f"model.{match[1]}.", match[2]) if match else ("", official)
    if name in _TO_TRANSFORMERS:
        return lead + _TO_TRANSFORMERS[name]
    stem, _, suffix = name.rpartition(".")
    return lead + _TO_TRANSFORMERS[stem] + (".weight_scale_inv" if suffix == "scale" else "." + suffix)


_EXPERT = re.compile(r"^((?:layers|mtp)\.\d+)\.ffn\.experts\.(\d+)\.(w[123])\.(weight|scale)$")


def fused_name(official: str) -> tuple[str, int, int, int] | None:
    """(stacked name, expert, which part, parts) for a routed expert's tensor, None for anything else.

    `layers.3.ffn.experts.7.w3.weight` -> ("model.layers.3.mlp.experts.gate_up_proj", 7, 1, 2).
    """
    match = _EXPERT.match(official)
    if match is None:
        return None
    for fused, parts in FUSED.items():
        if match[3] in parts:
            name = f"model.{match[1]}.{fused}" + ("_scale_inv" if match[4] == "scale" else "")
            return name, int(match[2]), parts.index(match[3]), len(parts)
    raise AssertionError(official)
