"""Features of any network by module path, read by forward hooks that are always removed.

A path is one of `dict(model.named_modules())`, e.g. "layer4.1.conv2" or, in a `Normalized` net of ours,
"network.classifier".
"""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Any, Literal, Self, final

import torch
from torch import Tensor, nn

from unpoison.errors import InputError, nearest
from unpoison.models._forward import as_input, device_of, forward
from unpoison.models._layout import fastest_layout
from unpoison.models._preserved import preserved, usual_mode

Side = Literal["output", "input"]


@final
class FeatureTap:
    """Within the block, keeps the last input or output of one module.

    The tensor is not detached: gradients flow through it. The mode of the model is not changed.

    Arguments:
        model: any network.
        module_path: a path of `model.named_modules()`; "" is the model itself.
        side: "output" of the module or its first "input".

    Raises:
        InputError: the model has no such module (the message names the nearest path); on reading `value`, the
            module was not reached by the forward pass or gave no tensor.

    >>> import torch
    >>> from unpoison.models import build
    >>> model = build("convnet-bn", num_classes=10, seed=0).eval()
    >>> with FeatureTap(model, "classifier", side="input") as tap:
    ...     _ = model(torch.rand(2, 3, 32, 32))
    >>> tuple(tap.value.shape)
    (2, 64)
    """

    def __init__(self, model: nn.Module, module_path: str, *, side: Side = "output") -> None:
        modules = dict(model.named_modules())
        if module_path not in modules:
            raise InputError(
                f"module path {module_path!r}: the model has no such module; "
                f"{nearest(module_path, filter(None, modules))}"
            )
        if side not in ("output", "input"):
            raise InputError(f"side: expected 'output' or 'input', found {side!r}")
        self._module = modules[module_path]
        self._path = module_path
        self._side = side
        self._kept: Any = None
        self._seen = False
        self._handle: torch.utils.hooks.RemovableHandle | None = None
        self._eager = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._seen, self._kept = False, None
        # A compiled network that has run without the hook would not call it.
        self._eager.enter_context(torch.compiler.set_stance("force_eager"))
        self._handle = self._module.register_forward_hook(self._keep)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._eager.close()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        kept = output if self._side == "output" else (inputs[0] if inputs else None)
        self._kept = kept[0] if isinstance(kept, (tuple, list)) and kept else kept
        self._seen = True

    @property
    def value(self) -> Tensor:
        """The tensor of the last forward pass (the first one, where the module returns several)."""
        if not self._seen:
            raise InputError(f"module path {self._path!r}: the forward pass does not reach this module")
        if not isinstance(self._kept, Tensor):
            raise InputError(
                f"module path {self._path!r}: its {self._side} is a {type(self._kept).__name__}, not a tensor"
            )
        return self._kept


def last_linear(model: nn.Module, *, otherwise: str) -> str:
    """The module path of the last linear layer, whose input most papers call the features.

    Raises:
        InputError: there is none; the message is `otherwise`.
    """
    paths: list[str] = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not paths:
        raise InputError(otherwise)
    return paths[-1]


def features(
    model: nn.Module,
    module_path: str,
    images: Tensor,
    *,
    batch_size: int = 256,
    side: Side = "output",
) -> Tensor:
    """The output (or input) of the module at `module_path` for each image, flattened: Float[n d].

    The model is in eval mode meanwhile and left as it was, also after an error. One pass over the images;
    memory for n d numbers and one batch.

    Arguments:
        model: any network that takes Float[b c h w] in [0, 1].
        module_path: a path of `model.named_modules()`.
        images: UInt8[n c h w], or Float[n c h w] in [0, 1]; moved to the model's device batch by batch.
        batch_size: images a forward pass.
        side: "output" of the module or its first "input"; the input of the last linear layer is what most
            detectors call the penultimate features.

    Returns:
        Features on the device of `images`, without gradient.

    Raises:
        InputError: no such module, it does not give one tensor row an image, or the model fails on the
            images.
    """
    rows = []
    layout = fastest_layout(model, images)
    with (
        usual_mode(device_of(model)),
        preserved(model),
        torch.no_grad(),
        FeatureTap(model, module_path, side=side) as tap,
    ):
        for batch in torch.split(images, max(batch_size, 1)):
            forward(model, as_input(model, batch, layout))
            kept = tap.value
            if kept.ndim == 0 or len(kept) != len(batch):
                raise InputError(
                    f"module path {module_path!r}: gave shape {tuple(kept.shape)} for {len(batch)} images; "
                    "expected one row an image"
                )
            rows.append(kept.detach().flatten(1).to(images.device, copy=True))
    return torch.cat(rows)
