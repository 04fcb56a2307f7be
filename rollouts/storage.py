"""Number formats of features on disk: as they are in memory, or in eight bits.

In eight bits a number is a float8_e4m3fn (Micikevicius et al. 2022, arXiv 2209.05433: 4 significant bits from 2^-6 to
448, fewer below), and every visual token has a scale of its own, a power of two that brings its largest number to
224 ... 448. So a number is off by 2^-4 of itself, or by 2^-17 of its token's largest, at most; on normally distributed
numbers that is 2.7 % of a token's length. One scale for a whole volume does as well while tokens are about equally
long, and saves one byte in 500. But beside one token that is 10^4 times as long (massive activations: Sun et al. 2024,
arXiv 2402.17762) the others would be off by 7 %, and at 10^6 times nothing would be left of them. With powers of two
nothing is rounded twice: scaling is exact in bfloat16, in which such features are read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rollouts.features import FEATURE_DTYPES

FLOAT8 = torch.float8_e4m3fn
_LARGEST = 0.875 * 2**9
"""448, the largest finite number of the format."""
_SMALLEST_EXPONENT = -126  # below it float32 and bfloat16 lose digits


def dtype_in_memory(storage: torch.dtype) -> torch.dtype:
    """The type of features that are read from this storage type."""
    return torch.bfloat16 if storage == FLOAT8 else storage


def bytes_per_token(hidden_size: int, storage: torch.dtype) -> int:
    """Size of one visual token on disk."""
    return hidden_size * storage.itemsize + (torch.float32.itemsize if storage == FLOAT8 else 0)


def room_remedy(storage: torch.dtype) -> str:
    """What to do where a cache in this format does not fit."""
    names = {torch.bfloat16: "bfloat16", FLOAT8: "float8_e4m3fn"}
    smaller = [name for dtype, name in names.items() if dtype.itemsize < storage.itemsize]
    formats = f"embed.dtype={' or '.join(smaller)}, " if smaller else ""
    return f"set embed.cache_dir to a larger disk, {formats}or a coarser view (slice_stride, height, width, crop)"


def pack(embeds_V_H: torch.Tensor, storage: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors that are stored: `embeds_V_H`, and with float8 `scale_V`, float32.

    Args:
        embeds_V_H: finite. For float8 they are rounded to bfloat16 first.
    """
    if storage != FLOAT8:
        return {"embeds_V_H": embeds_V_H.to(storage).contiguous()}
    embeds_V_H = embeds_V_H.to(torch.bfloat16)
    mantissa_V, exponent_V = torch.frexp(embeds_V_H.abs().amax(dim=1).float())
    exponent_V = exponent_V - 9 + (mantissa_V * 2**9 > _LARGEST).int()
    scale_V = torch.ldexp(torch.ones_like(mantissa_V), exponent_V.clamp(min=_SMALLEST_EXPONENT))
    values_V_H = (embeds_V_H / scale_V[:, None].to(torch.bfloat16)).to(FLOAT8)
    return {"embeds_V_H": values_V_H.contiguous(), "scale_V": scale_V}


def unpack(stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Features [V, H] from what `pack` made: the very tensor, or with float8 a new one in bfloat16.

    Raises:
        KeyError, ValueError: these are not such tensors.
    """
    embeds_V_H = stored["embeds_V_H"]
    if embeds_V_H.ndim != 2 or embeds_V_H.dtype not in (*FEATURE_DTYPES, FLOAT8):
        raise ValueError(f"it holds {embeds_V_H.dtype} {tuple(embeds_V_H.shape)}")
    if embeds_V_H.dtype != FLOAT8:
        return embeds_V_H
    scale_V = stored["scale_V"]
    if scale_V.dtype != torch.float32 or scale_V.shape != embeds_V_H.shape[:1]:
        raise ValueError(f"its scales are {scale_V.dtype} {tuple(scale_V.shape)}")
    return embeds_V_H.to(torch.bfloat16).mul_(scale_V[:, None].to(torch.bfloat16))


def as_read(embeds_V_H: torch.Tensor, storage: torch.dtype) -> torch.Tensor:
    """Features as they come back from the disk."""
    return unpack(pack(embeds_V_H, storage))
