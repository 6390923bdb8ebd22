"""How an `InfluenceIndex` keeps the coordinates of an example on the disk, and how they are multiplied.

In float16 where they are few, or where all gradients together are small; in int8 where whole gradients are
large: the numbers of a block of `BLOCK` are multiples of its largest magnitude / 127, which is kept beside
them. A cosine is a sum over all numbers of a gradient, in which the rounding of each hardly counts.

Products with rows in int8 are computed from `_COLUMNS` numbers at a time, in bfloat16 where the processor
has matrix instructions for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from unpoison.influence._index_space import quick_type

#: Numbers that share a scale.
BLOCK: Final = 32
_COLUMNS: Final = 128 * BLOCK
_LARGEST: Final = 127
_TINY: Final = 1e-38
# Rows that are quantised at a time on a processor, in whose cache they stay.
_CACHED: Final = 4


def row_bytes(numbers: int, quantised: bool) -> int:
    """Bytes of the coordinates of an example."""
    blocks = -(-numbers // BLOCK)
    return blocks * (BLOCK + 2) if quantised else 2 * numbers


def packed(values: Tensor, quantised: bool) -> dict[str, Tensor]:
    """Float[b m] coordinates as they are kept: `coordinates`, and `scales` where they are quantised."""
    if not quantised:
        return {"coordinates": values.half()}
    width = -(-values.shape[1] // BLOCK)
    codes = torch.empty(len(values), width * BLOCK, dtype=torch.int8, device=values.device)
    scales = torch.empty(len(values), width, dtype=torch.bfloat16, device=values.device)
    step = _CACHED if values.device.type == "cpu" else max(1, len(values))
    for start in range(0, len(values), step):
        own = slice(start, start + step)
        some = functional.pad(values[own], (0, -values.shape[1] % BLOCK))
        blocks = some.view(len(some), width, BLOCK)
        largest = blocks.abs()
        while largest.shape[2] > 1:  # a reduction over so few numbers would not be vectorised
            largest = torch.maximum(*largest.chunk(2, dim=2))
        scales[own] = largest[:, :, 0] / _LARGEST  # rounded, so that quotients are up to 127.3
        inverse = 1 / scales[own].to(blocks).clamp(min=_TINY)
        codes[own] = blocks.mul_(inverse[..., None]).round_().flatten(1)
    return {"coordinates": codes, "scales": scales}


def unpacked(kept: Mapping[str, Tensor], rows: Tensor | slice, width: int) -> Tensor:
    """Float32[k m]: the coordinates of some rows."""
    codes = kept["coordinates"][rows]
    if "scales" not in kept:
        return codes.float()
    return _restored(codes, kept["scales"][rows], torch.float32)[:, :width]


def products(kept: Mapping[str, Tensor], rows: Tensor | slice, queries: Tensor) -> Tensor:
    """Float32[k q]: inner products of the coordinates of some rows with those of queries, Float[q m]."""
    codes = kept["coordinates"][rows]
    if "scales" not in kept:
        return codes.float() @ queries.float().t()
    scales, quick = kept["scales"][rows], quick_type(codes.device)
    asked = functional.pad(queries, (0, codes.shape[1] - queries.shape[1])).to(quick)
    found = torch.zeros(len(codes), len(queries))
    # A sum in bfloat16 has its few digits, so that it is over few columns.
    for start in range(0, codes.shape[1], _COLUMNS):
        own = slice(start, start + _COLUMNS)
        some = _restored(codes[:, own], scales[:, start // BLOCK : (start + _COLUMNS) // BLOCK], quick)
        found += some @ asked[:, own].t()
    return found


def _restored(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    blocks = codes.reshape(len(codes), -1, BLOCK).to(dtype)
    restored: Tensor = blocks.mul_(scales[..., None].to(dtype)).flatten(1)
    return restored
