"""MXFP4 matrices in the order in which the GPU's kernels read them: tiles of 64 rows and 128 columns, 4 KB in a row.

A kernel fetches such tiles with few bulk copies, and what a thread then reads of a tile, 16 bytes at a time, is its
fragment of the left operand of wgmma m64n8k32 in e4m3. Of 64 rows a thread (warp w, row r of 8, c of 4) has rows
16 w + r and 16 w + 8 + r, and of 128 columns those of scale c:

    column 32 c + 8 i + 4 h + j   ->   half h of word i, place j;   as an operand: slot 32 i + 16 h + 4 c + j

    a tile      [2 row halves, 128 threads, 4 words]
    a word      magnitudes of half 0 in bits 0 to 15 and of half 1 in bits 16 to 31, four bits each of which the
                highest is a sign: place j of half 0 has its sign at bit 8 j + 7, of half 1 at 8 j + 3

so that the four signs of a half lie, shifted once for half 1, where four bytes of e4m3 want them.
Scales of a tile are [128 threads, 2 row halves] bytes: how far an e8m0 code is below the largest of its row, `tops`.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_ROWS = 64
TILE_COLUMNS = 128


def tile_values(values: Tensor, paired: bool) -> Tensor:
    """values [N, K/2] uint8 as released -> the same bytes of information in tiles, [N, K/2] in name only.

    Rows of a tile are 64 neighbours or, `paired`, 32 of the first half and 32 of the second: a thread's two rows then
    are row n and row N/2 + n. N is a multiple of 64, K of 128.
    """
    n, width = values.shape
    codes = torch.stack([values & 15, values >> 4], -1).view(n, 2 * width)
    codes = _split_rows(codes, paired).unflatten(-1, (-1, 4, 4, 2, 4))  # t w j r | block c i h place
    codes = codes.permute(0, 4, 2, 1, 3, 5, 6, 7, 8)  # t block j w r c i | h place
    low, high = codes[..., 0, :], codes[..., 1, :]
    magnitudes: Tensor = torch.cat([_nibbles(low & 7), _nibbles(high & 7)], -1)
    signs: Tensor = (low & 8) << 4 | (high & 8)  # byte `place` of the word
    return (magnitudes | signs).reshape(n, width)


def untile_values(tiles: Tensor, paired: bool) -> Tensor:
    """What `tile_values` was made from."""
    n = len(tiles)
    words = tiles.view(n // TILE_ROWS, -1, 2, 4, 8, 4, 4, 4)  # t block j w r c i | byte
    low = torch.stack([words[..., :2] & 7, words[..., :2] >> 4 & 7], -1).flatten(-2) | words >> 4 & 8
    high = torch.stack([words[..., 2:] & 7, words[..., 2:] >> 4 & 7], -1).flatten(-2) | words & 8
    codes = torch.stack([low, high], -2).permute(0, 3, 2, 4, 1, 5, 6, 7, 8)  # t w j r | block c i h place
    codes = _join_rows(codes.flatten(4), paired)
    return codes[:, ::2] | codes[:, 1::2] << 4


def tile_scales(codes: Tensor, paired: bool) -> tuple[Tensor, Tensor]:
    """e8m0 codes [N, K/32] uint8 -> distances from the row's largest in tiles, [N, K/32] in name only, and tops [N].

    `tops` has the largest code of each row, in the order of the matrix's own rows.
    """
    tops = codes.amax(-1)
    below = _split_rows(tops[:, None] - codes, paired).unflatten(-1, (-1, 4))  # t w j r | block c
    return below.permute(0, 4, 1, 3, 5, 2).reshape(codes.shape), tops


def untile_scales(tiles: Tensor, tops: Tensor, paired: bool) -> Tensor:
    """What `tile_scales` was made from."""
    n = len(tiles)
    below = tiles.view(n // TILE_ROWS, -1, 4, 8, 4, 2).permute(0, 2, 5, 3, 1, 4)  # t w j r | block c
    return tops[:, None] - _join_rows(below.flatten(4), paired)


def _nibbles(codes: Tensor) -> Tensor:
    return codes[..., ::2] | codes[..., 1::2] << 4


def _split_rows(rows: Tensor, paired: bool) -> Tensor:
    """[N, ..] -> [tiles, 4 warps, 2 halves, 8 rows, ..]."""
    size = (2, -1, 4, 8) if paired else (-1, 4, 2, 8)
    split: Tensor = rows.unflatten(0, size)
    return split.movedim(0, 2) if paired else split


def _join_rows(rows: Tensor, paired: bool) -> Tensor:
    return (rows.movedim(2, 0) if paired else rows).flatten(0, 3)
