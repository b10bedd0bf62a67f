"""DeepSeek-V4 as a differentiable PyTorch module, for training the bundled checkpoint.

The same model as `triptych.model` (a test compares both, and Transformers), written for batches of equal length and
gradients instead of paged caches. Parameters carry the official names, except that a layer's routed and shared experts
are one tensor (the shared one last). Source: reference sections 2.1 to 2.8.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.config import CSA_LAYER, CSA_RATIO, SWA_LAYER, WINDOW, ModelShape
from triptych.model.rope import frequencies
from triptych.tiny import attention as at
from triptych.tiny.ops import HcSite, Ops
from triptych.tiny.rounding import round_experts, round_linear


@dataclass
class Mode:
    """How a forward pass runs. `topk` None means no selection (dense warm-up of the indexer).

    `hinted` [B, S] is the first of HINTS entries that a row should find, or -1: with `use_hints` they are added to its
    selection, and the share found without help is collected in `Run.recall`. `rounded` applies the storage formats.
    """

    dtype: torch.dtype = torch.float32
    topk: int | None = None
    extra: int = 0
    index_loss: bool = False
    hinted: Tensor | None = None
    use_hints: bool = False
    rounded: bool = False
    keep: bool = False


@dataclass
class Run:
    """What a forward pass collects besides its result."""

    index_losses: list[Tensor] = field(default_factory=list)
    recall: list[Tensor] = field(default_factory=list)
    loads: list[Tensor] = field(default_factory=list)
    past: list[at.Past] = field(default_factory=list)


class Rows(NamedTuple):
    """Where the rows of a batch are: batch and length, index of the first token, and cos, sin [T, p] of each rope."""

    batch: int
    length: int
    start: int
    main: tuple[Tensor, Tensor]
    compress: tuple[Tensor, Tensor]


class Weight(nn.Module):
    """One tensor under the name `weight`."""

    def __init__(self, *size: int, std: float | None = None, fill: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full(size, fill) if std is None else torch.randn(*size) * std)


def linear(rows: int, columns: int, gain: float = 1.0) -> Weight:
    """A matrix [rows, columns] whose outputs start at about `gain` times its inputs' size."""
    return Weight(rows, columns, std=gain * columns**-0.5)


class Compressor(nn.Module):
    """Projections, position bias and norm of one compressor (section 2.5)."""

    def __init__(self, shape: ModelShape, ratio: int, dim: int) -> None:
        super().__init__()
        width = dim * (2 if ratio == CSA_RATIO else 1)
        self.wkv = linear(width, shape.hidden_size)
        self.wgate = linear(width, shape.hidden_size, 0.3)
        self.ape = nn.Parameter(torch.zeros(ratio, width))
        self.norm = Weight(dim, fill=1.5)
        self.ratio = ratio

    def rows(self, x: Tensor) -> at.Pooled:
        """Values and gates of x [B, S, d], float32."""
        gates = F.linear(x, self.wgate.weight.to(x.dtype)).float()
        bias = self.ape.repeat(x.shape[1] // self.ratio, 1)
        return at.Pooled(F.linear(x, self.wkv.weight.to(x.dtype)).float(), gates + bias)


class Indexer(nn.Module):
    """The lightning indexer of a CSA layer (section 2.6)."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.wq_b = linear(shape.index_heads * shape.index_head_dim, shape.q_lora_rank)
        self.weights_proj = linear(shape.index_heads, shape.hidden_size, 2.0)
        self.compressor = Compressor(shape, CSA_RATIO, shape.index_head_dim)


class Attention(nn.Module):
    """Parameters of one attention (section 2.3)."""

    def __init__(self, shape: ModelShape, ratio: int) -> None:
        super().__init__()
        heads, dim = shape.num_heads, shape.head_dim
        self.wq_a = linear(shape.q_lora_rank, shape.hidden_size)
        self.q_norm = Weight(shape.q_lora_rank, fill=1.0)
        self.wq_b = linear(heads * dim, shape.q_lora_rank)
        self.wkv = linear(dim, shape.hidden_size)
        self.kv_norm = Weight(dim, fill=1.2)
        self.wo_a = linear(shape.o_groups * shape.o_lora_rank, heads // shape.o_groups * dim)
        self.wo_b = linear(shape.hidden_size, shape.o_groups * shape.o_lora_rank, 0.2)
        self.attn_sink = nn.Parameter(torch.zeros(heads))
        if ratio != SWA_LAYER:
            self.compressor = Compressor(shape, ratio, dim)
        if ratio == CSA_LAYER:
            self.indexer = Indexer(shape)


class Gate(nn.Module):
    """Router: learned with a selection bias, or by token id."""

    bias: Tensor
    tid2eid: Tensor

    def __init__(self, shape: ModelShape, hashed: bool) -> None:
        super().__init__()
        self.hashed = hashed
        self.weight = nn.Parameter(torch.randn(shape.num_experts, shape.hidden_size) * shape.hidden_size**-0.5)
        if hashed:
            draw = torch.rand(shape.vocab_size, shape.num_experts, generator=torch.Generator().manual_seed(0))
            self.register_buffer("tid2eid", draw.argsort(1)[:, : shape.experts_per_token].contiguous())
        else:
            self.register_buffer("bias", torch.zeros(shape.num_experts))


class Experts(nn.Module):
    """All experts of a layer, the shared one last: w1, w3 [E+1, I, d], w2 [E+1, d, I]."""

    def __init__(self, shape: ModelShape, hashed: bool) -> None:
        super().__init__()
        count, wide, d = shape.num_experts + 1, shape.moe_intermediate_size, shape.hidden_size
        self.gate = Gate(shape, hashed)
        self.w1 = nn.Parameter(torch.randn(count, wide, d) * d**-0.5)
        self.w3 = nn.Parameter(torch.randn(count, wide, d) * d**-0.5)
        self.w2 = nn.Parameter(torch.randn(count, d, wide) * wide**-0.5 * 0.2)


class Block(nn.Module):
    """One layer: two mHC sites around attention and experts."""

    def __init__(self, shape: ModelShape, layer: int, ratio: int) -> None:
        super().__init__()
        n, d = shape.hc_mult, shape.hidden_size
        self.layer, self.ratio, self.hashed = layer, ratio, shape.is_hash_layer(layer)
        self.attn_norm, self.ffn_norm = Weight(d, fill=1.0), Weight(d, fill=1.0)
        self.attn = Attention(shape, ratio)
        self.ffn = Experts(shape, self.hashed)
        base = torch.cat([torch.full((n,), -1.0986), torch.zeros(n), 3.0 * torch.eye(n).flatten()])
        for site in ("attn", "ffn"):
            self.register_parameter(f"hc_{site}_fn", nn.Parameter(torch.randn((2 + n) * n, n * d) * (n * d) ** -0.5))
            self.register_parameter(f"hc_{site}_base", nn.Parameter(base + 0.3 * torch.randn_like(base)))
            self.register_parameter(f"hc_{site}_scale", nn.Parameter(torch.full((3,), 0.1)))


class HeadCollapse(nn.Module):
    """Parameters of an HC head: hc_head_fn, hc_head_base, hc_head_scale, and the norm behind it."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        n, d = shape.hc_mult, shape.hidden_size
        self.hc_head_fn = nn.Parameter(torch.randn(n, n * d) * (n * d) ** -0.5)
        self.hc_head_base = nn.Parameter(torch.full((n,), -1.0986))
        self.hc_head_scale = nn.Parameter(torch.full((1,), 0.1))
        self.norm = Weight(d, fill=1.0)


class Mtp(HeadCollapse):
    """The multi-token prediction block (section 2.8): predicts the token after next."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(shape)
        d = shape.hidden_size
        self.block = Block(shape, shape.num_layers, SWA_LAYER)
        self.e_proj, self.h_proj = linear(d, d), linear(d, d)
        self.enorm, self.hnorm = Weight(d, fill=1.0), Weight(d, fill=1.0)


HINTS = 3  # entries that a value of up to seven digits touches, with the overlap


class Front(NamedTuple):
    """What both attention parts share: x, qr [T, *], q [B, S, H, c], window rows [B, 128 + S, c] and their scores."""

    x: Tensor
    qr: Tensor
    q: Tensor
    window: Tensor
    scores: list[Tensor]


class Net(HeadCollapse):
    """The whole model. `fused` compiles the row-wise operations."""

    freq_main: Tensor
    freq_compress: Tensor

    def __init__(self, shape: ModelShape, *, fused: bool = False) -> None:
        super().__init__(shape)
        self.shape = shape
        self.embed = Weight(shape.vocab_size, shape.hidden_size, std=0.5)
        self.head = Weight(shape.vocab_size, shape.hidden_size, std=shape.hidden_size**-0.5)
        self.layers = nn.ModuleList(Block(shape, i, r) for i, r in enumerate(shape.ratios))
        self.mtp = nn.ModuleList(Mtp(shape) for _ in range(shape.num_mtp_layers))
        self.ops = Ops(fused)
        self.register_buffer("freq_main", frequencies(shape.rope_dim, shape.rope_theta, None), persistent=False)
        compress = frequencies(shape.rope_dim, shape.compress_rope_theta, shape.yarn)
        self.register_buffer("freq_compress", compress, persistent=False)

    def streams(self, ids: Tensor, positions: Tensor, mode: Mode, past: list[at.Past] | None = None,
                start: int = 0) -> tuple[Tensor, Run]:  # fmt: skip
        """Residual streams [B*S, n, d] after the last layer. ids, positions [B, S]; S and start multiples of 128.

        With `mode.keep`, `Run.past` is what the next chunk needs.
        """
        rows, run = self._rows(ids, positions, start), Run()
        x = self._embedded(ids, mode).unsqueeze(1).expand(-1, self.shape.hc_mult, -1).contiguous()
        for layer, block in enumerate(self.layers):
            x = self._block(block, x, ids, rows, mode, run, past[layer] if past else None)  # type: ignore[arg-type]
        return x, run

    def hidden(self, streams: Tensor, owner: HeadCollapse) -> Tensor:
        """What the head multiplies: streams [T, n, d] collapsed and normed by the backbone's or the MTP's head."""
        shape = self.shape
        h = self.ops.hc_head(streams, owner.hc_head_fn, owner.hc_head_base, owner.hc_head_scale, shape.hc_eps,
                             shape.norm_eps)  # fmt: skip
        out: Tensor = self.ops.rms_norm(h, owner.norm.weight, shape.norm_eps)
        return out

    @property
    def draft_block(self) -> Mtp:
        """The first (and only) MTP block."""
        block = self.mtp[0]
        assert isinstance(block, Mtp)
        return block

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, vocab] of hidden [T, d]."""
        return F.linear(hidden, self.head.weight.to(hidden.dtype))

    def draft_streams(self, streams: Tensor, ids: Tensor, positions: Tensor, mode: Mode) -> tuple[Tensor, Run]:
        """Streams of the MTP block, [B*S, n, d]: row t combines the backbone at t with the embedding of token t + 1.

        The last row of each sequence has no next token; it sees the first one's and is to be ignored.
        """
        shape, mtp = self.shape, self.draft_block
        following = torch.roll(ids, -1, dims=1)
        e = self.ops.rms_norm(self._embedded(following, mode), mtp.enorm.weight, shape.norm_eps)
        h = self.ops.rms_norm(streams, mtp.hnorm.weight, shape.norm_eps)
        x = self._linear(h, mtp.h_proj, mode) + self._linear(e, mtp.e_proj, mode).unsqueeze(1)
        run = Run()
        mode = replace(mode, keep=False)
        return self._block(mtp.block, x, following, self._rows(ids, positions, 0), mode, run, None), run

    def _embedded(self, ids: Tensor, mode: Mode) -> Tensor:
        return F.embedding(ids.reshape(-1), self.embed.weight.to(mode.dtype))

    def _rows(self, ids: Tensor, positions: Tensor, start: int) -> Rows:
        assert ids.shape[1] % WINDOW == 0 and start % WINDOW == 0
        angles = [positions.reshape(-1, 1).float() * f for f in (self.freq_main, self.freq_compress)]
        main, compress = ((a.cos(), a.sin()) for a in angles)
        batch, length = ids.shape
        return Rows(batch, length, start, main, compress)

    def _linear(self, x: Tensor, weight: Weight, mode: Mode) -> Tensor:
        w = round_linear(weight.weight) if mode.rounded else weight.weight
        return F.linear(x, w.to(x.dtype))

    def _site(self, block: Block, site: str) -> HcSite:
        fn, base, scale = (getattr(block, f"hc_{site}_{part}") for part in ("fn", "base", "scale"))
        norm = (block.attn_norm if site == "attn" else block.ffn_norm).weight
        shape = self.shape
        return HcSite(fn, base, scale, norm, shape.hc_sinkhorn_iters, shape.hc_eps, shape.norm_eps)

    def _block(self, block: Block, x: Tensor, ids: Tensor, rows: Rows, mode: Mode, run: Run,
               past: at.Past | None) -> Tensor:  # fmt: skip
        maps = self.ops.hc_pre(x, self._site(block, "attn"))
        y = self._attention(block, maps.x, rows, mode, run, past)
        x = self.ops.hc_post(y, x, maps.post, maps.comb)
        maps = self.ops.hc_pre(x, self._site(block, "ffn"))
        y = self._experts(block.ffn, maps.x, ids.reshape(-1), mode, run)
        out: Tensor = self.ops.hc_post(y, x, maps.post, maps.comb)
        return out

    def _experts(self, ffn: Experts, x: Tensor, ids: Tensor, mode: Mode, run: Run) -> Tensor:
        shape = self.shape
        affinity = torch.sqrt(F.softplus(F.linear(x.float(), ffn.gate.weight)))
        if ffn.gate.hashed:
            chosen = ffn.gate.tid2eid[ids]
        else:
            chosen = (affinity.detach() + ffn.gate.bias).topk(shape.experts_per_token, dim=-1).indices
        mask = torch.zeros_like(affinity).scatter_(1, chosen, 1.0)
        run.loads.append(mask.mean(0))
        gains = affinity * mask
        gains = shape.routed_scaling * gains / gains.sum(-1, keepdim=True)
        gains = torch.cat([gains, torch.ones_like(gains[:, :1])], dim=1)
        w1, w3, w2 = (round_experts(w) if mode.rounded else w for w in (ffn.w1, ffn.w3, ffn.w2))
        both = torch.cat([w1.flatten(0, 1), w3.flatten(0, 1)]).to(x.dtype)
        h = F.linear(x, both).view(x.shape[0], 2, w1.shape[0], w1.shape[1])
        hidden = self.ops.expert_hidden(h, gains, shape.swiglu_limit)
        return F.linear(hidden.flatten(1), w2.permute(1, 0, 2).flatten(1).to(x.dtype))

    def _attention(self, block: Block, x: Tensor, rows: Rows, mode: Mode, run: Run, past: at.Past | None) -> Tensor:
        attn, shape, ratio = block.attn, self.shape, block.ratio
        batch, length, heads, dim = rows.batch, rows.length, shape.num_heads, shape.head_dim
        cos, sin = rows.main if ratio == SWA_LAYER else rows.compress
        qr = self.ops.rms_norm(self._linear(x, attn.wq_a, mode), attn.q_norm.weight, shape.norm_eps)
        q = self.ops.rms_norm(self._linear(qr, attn.wq_b, mode).view(-1, heads, dim), None, shape.norm_eps)
        q = self.ops.rotate(q, cos.unsqueeze(1), sin.unsqueeze(1)).view(batch, length, heads, dim)
        kv = self.ops.rms_norm(self._linear(x, attn.wkv, mode), attn.kv_norm.weight, shape.norm_eps)
        kv = self.ops.rotate(kv, cos, sin).view(batch, length, dim)
        before = past.rows if past else kv.new_zeros(batch, WINDOW, dim)
        window = torch.cat([before, kv], dim=1)
        if mode.keep:
            run.past.append(at.Past(window[:, -WINDOW:]))
        scores = [at.window_scores(q, window, rows.start)]
        if ratio == SWA_LAYER:
            o = at.window_values(at.joint_softmax(scores, attn.attn_sink)[0], window)
        else:
            o = self._with_entries(block, Front(x, qr, q, window, scores), rows, mode, run, past)
        o = self.ops.rotate(o.reshape(-1, heads, dim), cos.unsqueeze(1), -sin.unsqueeze(1))
        wide = o.view(-1, shape.o_groups, heads // shape.o_groups * dim)
        w = round_linear(attn.wo_a.weight) if mode.rounded else attn.wo_a.weight
        low = torch.einsum("tgi,goi->tgo", wide, w.to(x.dtype).unflatten(0, (shape.o_groups, -1)))
        return self._linear(low.flatten(1), attn.wo_b, mode)

    def _pooled(self, comp: Compressor, x: Tensor, rows: Rows, tail: tuple[Tensor, Tensor] | None,
                tails: list[tuple[Tensor, Tensor]]) -> Tensor:  # fmt: skip
        """New entries [B, S/ratio, D], normed and rotated at the first position of their groups."""
        pooled = comp.rows(x)
        if comp.ratio == CSA_RATIO:
            entries = at.pool_csa(pooled, tail)
            tails.append((pooled.values[:, -CSA_RATIO:], pooled.gates[:, -CSA_RATIO:]))
        else:
            entries = at.pool_hca(pooled, comp.ratio)
        entries = self.ops.rms_norm(entries.to(x.dtype), comp.norm.weight, self.shape.norm_eps)
        cos, sin = (a.view(rows.batch, rows.length, -1)[:, :: comp.ratio] for a in rows.compress)
        out: Tensor = self.ops.rotate(entries, cos, sin)
        return out

    def _with_entries(self, block: Block, front: Front, rows: Rows, mode: Mode, run: Run,
                      past: at.Past | None) -> Tensor:  # fmt: skip
        """Attention over window and compressed entries, [B, S, H, c]."""
        attn, ratio, tails = block.attn, block.ratio, list[tuple[Tensor, Tensor]]()
        x = front.x.view(rows.batch, rows.length, -1)
        old = past.tails if past else []
        entries = self._pooled(attn.compressor, x, rows, old[0] if old else None, tails)
        if past and past.entries is not None:
            entries = torch.cat([past.entries, entries], dim=1)
        keys = None
        if ratio == CSA_LAYER and (mode.topk is not None or mode.index_loss or mode.keep):
            comp = attn.indexer.compressor
            keys = self._pooled(comp, x.detach(), rows, old[1] if old else None, tails)
            if past and past.keys is not None:
                keys = torch.cat([past.keys, keys], dim=1)
        if mode.keep:
            run.past[-1] = at.Past(front.window[:, -WINDOW:], entries, keys, tails)
        if keys is not None and (mode.topk is not None or mode.index_loss):
            return self._sparse(attn, front, entries, keys, rows, mode, run)
        return self._dense(front, attn.attn_sink, entries, rows, ratio)[0]

    def _dense(self, front: Front, sink: Tensor, entries: Tensor, rows: Rows, ratio: int) -> tuple[Tensor, Tensor]:
        """Every visible entry; also the entries' probabilities [B, S, H, E]."""
        count = entries.shape[1]
        padded = F.pad(entries, (0, 0, 0, -count % 8))
        seen = at.visible(rows.start, rows.length, padded.shape[1], ratio, entries.device)
        q = front.q.flatten(1, 2)
        scores = torch.matmul(q, padded.transpose(1, 2)).view(*front.q.shape[:3], -1) * self.shape.head_dim**-0.5
        scores = scores.masked_fill(~seen[None, :, None], at.NEVER)
        near, far = at.joint_softmax([*front.scores, scores], sink)
        out = at.window_values(near, front.window)
        return out + torch.matmul(far.flatten(1, 2), padded).view_as(out), far[..., :count]

    def _sparse(self, attn: Attention, front: Front, entries: Tensor, keys: Tensor, rows: Rows, mode: Mode,
                run: Run) -> Tensor:  # fmt: skip
        """CSA with its indexer: selected entries, or all of them in the warm-up; collects loss and recall."""
        shape, count = self.shape, keys.shape[1]
        heads, dim = shape.index_heads, shape.index_head_dim
        qi = self._linear(front.qr.detach(), attn.indexer.wq_b, mode).view(-1, heads, dim)
        cos, sin = (a.unsqueeze(1) for a in rows.compress)
        qi = self.ops.rotate(qi, cos, sin).view(rows.batch, rows.length, heads, dim)
        wi = F.linear(front.x.detach(), attn.indexer.weights_proj.weight.to(front.x.dtype))
        wi = wi.view(rows.batch, rows.length, heads) * (heads * dim) ** -0.5
        if mode.topk is None or count <= mode.topk:
            out, probs = self._dense(front, attn.attn_sink, entries, rows, CSA_RATIO)
            if mode.index_loss:
                dots = torch.matmul(qi.flatten(1, 2), keys.transpose(1, 2)).unflatten(1, (-1, heads))
                seen = at.visible(rows.start, rows.length, count, CSA_RATIO, keys.device)[None]
                score = self.ops.index_scores(dots, wi)
                run.index_losses.append(self._kl(probs, score, seen.expand_as(score), mode))
            return out
        chosen = at.select(qi, wi, keys, rows.start, mode.topk, self.ops.block_scores)
        chosen = self._with_hints(chosen, rows, mode, run)
        picked = at.take(entries, chosen.entries)
        scores = torch.matmul(front.q, picked.transpose(2, 3)) * shape.head_dim**-0.5
        scores = scores.masked_fill(~chosen.valid.unsqueeze(2), at.NEVER)
        near, far = at.joint_softmax([*front.scores, scores], attn.attn_sink)
        if mode.index_loss:
            wide = self._widened(chosen, rows, mode.extra)
            dots = torch.matmul(qi, at.take(keys, wide.entries).transpose(2, 3))
            score = self.ops.index_scores(dots, wi)
            target = F.pad(far, (0, mode.extra))
            run.index_losses.append(self._kl(target, score, wide.valid, mode))
        return at.window_values(near, front.window) + torch.matmul(far, picked)

    def _kl(self, probs: Tensor, score: Tensor, valid: Tensor, mode: Mode) -> Tensor:
        """The indexer's loss: all rows, and once more the rows that have something to find."""
        target = probs.detach().float().mean(2)
        every = torch.ones_like(target[..., 0])
        loss = at.index_loss(target, score, valid, every)
        if mode.hinted is not None:
            loss = loss + at.index_loss(target, score, valid, (mode.hinted >= 0).float())
        return loss

    def _widened(self, chosen: at.Selection, rows: Rows, extra: int) -> at.Selection:
        """The selection and `extra` random visible entries, so that unselected ones are pushed down as well."""
        seen = torch.arange(rows.start + 1, rows.start + rows.length + 1, device=chosen.entries.device) // CSA_RATIO
        draw = torch.rand(rows.batch, rows.length, extra, device=chosen.entries.device)
        index = (draw * seen.view(1, -1, 1)).long()
        fresh = ~(index.unsqueeze(-1) == chosen.entries.unsqueeze(-2)).any(-1) & (seen.view(1, -1, 1) > 0)
        return at.Selection(torch.cat([chosen.entries, index], -1), torch.cat([chosen.valid, fresh], -1))

    def _with_hints(self, chosen: at.Selection, rows: Rows, mode: Mode, run: Run) -> at.Selection:
        """Measure how many hinted entries were found; with `use_hints` put the missing ones in the last places."""
        if mode.hinted is None:
            return chosen
        wanted = mode.hinted.unsqueeze(-1) + torch.arange(HINTS, device=chosen.entries.device)
        asked = (mode.hinted >= 0).unsqueeze(-1)
        found = (wanted.unsqueeze(-1) == chosen.entries.unsqueeze(-2)).any(-1) & asked
        run.recall.append((found.sum() / (asked.sum() * HINTS).clamp_min(1)).detach())
        if not mode.use_hints:
            return chosen
        add = asked & ~found
        kept = ~add[..., :HINTS]
        index = torch.where(kept, chosen.entries[..., -HINTS:], wanted)
        valid = torch.where(kept, chosen.valid[..., -HINTS:], True)
        index = torch.cat([chosen.entries[..., :-HINTS], index], -1)
        return at.Selection(index, torch.cat([chosen.valid[..., :-HINTS], valid], -1))
