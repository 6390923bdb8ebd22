"""`nn.MultiheadAttention` in steps, so that the inputs and output gradients of its projections can be read.

Its own forward multiplies by the packed weight inside of one function, and its fast path computes whole
encoder layers at once. Within `attention_in_steps` each attention calls a Linear that holds the packed
weight, the same function with identity projections, and its `out_proj`: the same numbers up to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from unpoison.influence._layers import Member


def packed_member(module: nn.MultiheadAttention, prefix: str) -> Member:
    """The packed projection as a Linear of its own, which `attention_in_steps` calls."""
    weight, bias = module.in_proj_weight, module.in_proj_bias
    packed = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    packed.weight = weight
    if bias is not None:
        packed.bias = bias
    return Member(packed, f"{prefix}weight", None if bias is None else f"{prefix}bias")


@contextlib.contextmanager
def attention_in_steps(model: nn.Module, packed: dict[int, nn.Module]) -> Iterator[None]:
    """Within the block every `nn.MultiheadAttention` of torch's own forward computes step by step.

    Arguments:
        model: any network; left as it was.
        packed: the Linear to call for a packed weight, by the `id` of the weight; others are made.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    changed = []
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module in model.modules():
            if (
                isinstance(module, nn.MultiheadAttention)
                and type(module).forward is nn.MultiheadAttention.forward
                and "forward" not in vars(module)
                and module.in_proj_weight is not None
            ):
                linear = packed.get(id(module.in_proj_weight)) or packed_member(module, "").module
                object.__setattr__(module, "forward", _Steps(module, linear))
                changed.append(module)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module in changed:
            object.__delattr__(module, "forward")


class _Steps:
    """The forward of one attention."""

    def __init__(self, module: nn.MultiheadAttention, packed: nn.Module) -> None:
        self.module, self.packed = module, packed

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        module, width = self.module, self.module.embed_dim
        if key is query and value is query:
            parts = list(self.packed(query).chunk(3, -1))
        else:  # of each product a third is used; the gradient of the rest is zero
            parts = [self.packed(one).chunk(3, -1)[place] for place, one in enumerate((query, key, value))]
        swap = module.batch_first and query.ndim == 3
        if swap:
            parts = [one.transpose(0, 1) for one in parts]
        same = torch.eye(width, dtype=query.dtype, device=query.device)
        options: dict[str, Any] = {
            "use_separate_proj_weight": True,
            "q_proj_weight": same,
            "k_proj_weight": same,
            "v_proj_weight": same,
            "training": module.training,
            "key_padding_mask": key_padding_mask,
            "need_weights": need_weights,
            "attn_mask": attn_mask,
            "average_attn_weights": average_attn_weights,
            "is_causal": is_causal,
        }
        attended, weights = functional.multi_head_attention_forward(
            parts[0],
            parts[1],
            parts[2],
            width,
            module.num_heads,
            None,
            None,
            module.bias_k,
            module.bias_v,
            module.add_zero_attn,
            module.dropout,
            same,
            None,
            **options,
        )
        output: Tensor = module.out_proj(attended.transpose(0, 1) if swap else attended)
        return output, weights
