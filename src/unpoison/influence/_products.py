"""`products`: the one large matrix product of scoring, by whichever library does it faster.

On a processor, torch computes float32 matrix products with MKL, which leaves half of the vector width of AMD
processors unused; oneDNN, which torch includes for convolutions, does not. It is reached by the operator that
compiled models use; where a build of torch lacks that, the plain product is taken.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _one_dnn() -> Callable[..., Tensor] | None:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    try:
        operator: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:
        return None
    return operator


_ONE_DNN = _one_dnn()


def products(left: Tensor, right: Tensor) -> Tensor:
    """Float[m, b] of Float[m, p] and Float[b, p]: all inner products of rows with rows."""
    if _ONE_DNN is not None and left.device.type == "cpu" and left.dtype == torch.float32:
        return _ONE_DNN(left, right, None, "none", [], "")
    return torch.mm(left, right.t())
