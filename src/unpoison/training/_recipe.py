"""`Recipe`: every setting of a training run except the data and the seed; free of torch.

| preset | what | source |
|---|---|---|
| `sample` | the bundled Fashion-MNIST on two cores, well under a minute | ours |
| `cifar10-small` | all of CIFAR-10 on two cores in minutes | ours |
| `resnet18-40` | CIFAR-10, 40 epochs, /10 at 14, 24, 35 | poisoning-gradient-matching, "conservative" |
| `resnet18-200` | CIFAR-10, 200 epochs, /10 at 100, 150, no decay of norms and biases | EPIC |
| `benchmark-200` | CIFAR-10, 200 epochs, /10 at 100, 150 | the poisoning benchmark, from scratch |
| `fast` | CIFAR-10 on one GPU in seconds | ours, after airbench94 |
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Self, final

from unpoison._artefacts import canonical_json, digest
from unpoison._option_checks import check_options
from unpoison.errors import InputError, nearest
from unpoison.models import architecture

Schedule = Literal["constant", "multistep", "cosine", "one-cycle"]
Precision = Literal["float32", "bfloat16"]
_FRACTIONAL: Final = (
    "learning_rate",
    "bias_learning_rate_factor",
    "momentum",
    "weight_decay",
    "gamma",
    "warmup_epochs",
    "label_smoothing",
)


@final
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train: architecture, optimiser (SGD), schedule, augmentation, precision.

    Arguments:
        model: one of `unpoison.models.names()`; not used where `train` is given a network to start from.
        width: channels of the first convolution, 1 or more; None takes the published width.
        epochs: passes over the training set, 1 or more.
        batch_size: examples a step, 1 or more.
        learning_rate: the greatest of the schedule, above 0.
        bias_learning_rate_factor: the learning rate of parameters of one dimension (biases, norms) over that
            of the rest; their weight decay is divided by it, so that a step decays all alike.
        momentum: in [0, 1).
        nesterov: Nesterov momentum.
        weight_decay: L2 coefficient added to the gradient, 0 or more.
        decay_norm_and_bias: whether parameters of one dimension are decayed too.
        schedule: "constant"; "multistep", times `gamma` at each of `milestones`; "cosine" to zero; or
            "one-cycle", linear to zero. A linear warm-up may precede each; that of "one-cycle" is its rise.
        milestones: epochs at which "multistep" multiplies, ascending, each in 1..epochs-1.
        gamma: the factor at milestones, in (0, 1].
        warmup_epochs: length of the linear rise from zero, 0..epochs, fractions allowed.
        flip: mirror each image with probability 1/2.
        crop_padding: pixels of reflection padding before a random crop; 0 is off.
        cutout: side in pixels of a random black square; 0 is off.
        label_smoothing: share of the label spread over all classes, in [0, 1).
        precision: "float32", or "bfloat16" for autocast on CUDA; on other devices, where it would be slower,
            that means float32.

    Raises:
        InputError: names the field, the value and what is allowed.

    >>> Recipe(model="resnet9", width=8, epochs=10).learning_rate_at(5.0)
    0.1
    >>> Recipe.preset("resnet18-40").milestones
    (14, 24, 35)
    """

    model: str = "resnet18"
    width: Annotated[int, "[1, 4096]"] | None = None
    epochs: Annotated[int, "[1, 100000]"] = 40
    batch_size: Annotated[int, "[1, 1000000]"] = 128
    learning_rate: Annotated[float, "(0, 1000000]"] = 0.1
    bias_learning_rate_factor: Annotated[float, "[0, 1000000]"] = 1.0
    momentum: Annotated[float, "[0, 1)"] = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float, "[0, 1000]"] = 5e-4
    decay_norm_and_bias: bool = True
    schedule: Schedule = "constant"
    milestones: tuple[int, ...] = ()
    gamma: Annotated[float, "(0, 1]"] = 0.1
    warmup_epochs: float = 0.0
    flip: bool = False
    crop_padding: Annotated[int, "[0, 1024]"] = 0
    cutout: Annotated[int, "[0, 1024]"] = 0
    label_smoothing: Annotated[float, "[0, 1)"] = 0.0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        architecture(self.model)
        check_options("recipe", self, warmup_epochs=f"[0, {self.epochs}]")
        for name in _FRACTIONAL:
            # 1 and 1.0 are the same recipe and must have the same fingerprint.
            object.__setattr__(self, name, float(getattr(self, name)))
        ascending = all(early < late for early, late in itertools.pairwise(self.milestones))
        if not ascending or not all(0 < epoch < self.epochs for epoch in self.milestones):
            raise InputError(
                f"recipe: milestones must be ascending whole numbers in 1..{self.epochs - 1}, "
                f"found {list(self.milestones)}"
            )
        if self.nesterov and not self.momentum:
            raise InputError(
                "recipe: nesterov needs momentum above 0; set nesterov to false or raise momentum"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Recipe:
        """The preset called `name`, with some fields changed.

        Raises:
            InputError: there is no such preset or no such field.

        >>> Recipe.preset("resnet18-40", epochs=36).epochs
        36
        """
        if name not in PRESETS:
            raise InputError(f"recipe: there is no preset {name!r}; {nearest(name, cls.presets())}")
        return cls.from_dict({**PRESETS[name].to_dict(), **changes})

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """The names of the presets, sorted."""
        return tuple(sorted(PRESETS))

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the inverse of `from_dict`."""
        return {**asdict(self), "milestones": list(self.milestones)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A recipe from plain values; fields that are not given have their defaults.

        Raises:
            InputError: an unknown field (the message gives the nearest one) or a value out of range.
        """
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise InputError(f"recipe: unknown field {key!r}; {nearest(key, known)}")
        return cls(**values)

    @property
    def fingerprint(self) -> str:
        """A digest of all fields."""
        return digest(canonical_json(self.to_dict()))

    def learning_rate_at(self, progress: float) -> float:
        """The learning rate when `progress` epochs (a fraction, 0..epochs) have passed.

        The trainer evaluates it in the middle of each step, so no step has learning rate zero.

        >>> recipe = Recipe(epochs=10, learning_rate=1.0, schedule="one-cycle", warmup_epochs=2)
        >>> [recipe.learning_rate_at(progress) for progress in (0, 1, 2, 6, 10)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
        """
        if progress < self.warmup_epochs:
            return self.learning_rate * progress / self.warmup_epochs
        rest = self.epochs - self.warmup_epochs
        passed = (progress - self.warmup_epochs) / rest if rest else 1.0
        match self.schedule:
            case "constant":
                return self.learning_rate
            case "multistep":
                return self.learning_rate * self.gamma ** sum(progress >= epoch for epoch in self.milestones)
            case "cosine":
                return self.learning_rate * (1 + math.cos(math.pi * passed)) / 2
            case "one-cycle":
                return self.learning_rate * (1 - passed)


_SMALL: Final = Recipe(
    model="convnet-bn",
    width=16,
    epochs=15,
    batch_size=64,
    learning_rate=0.05,
    schedule="one-cycle",
    warmup_epochs=2,
    flip=True,
    crop_padding=1,
)
_RESNET18: Final = Recipe(
    model="resnet18", epochs=200, schedule="multistep", milestones=(100, 150), flip=True, crop_padding=4
)
PRESETS: Final[Mapping[str, Recipe]] = MappingProxyType(
    {
        "sample": _SMALL,
        "cifar10-small": replace(
            _SMALL, model="resnet9", epochs=10, batch_size=128, learning_rate=0.1, crop_padding=4
        ),
        "resnet18-40": replace(_RESNET18, epochs=40, milestones=(14, 24, 35)),
        "resnet18-200": replace(_RESNET18, decay_norm_and_bias=False),
        "benchmark-200": replace(_RESNET18, nesterov=False, weight_decay=2e-4),
        # airbench94 sums its loss over 1,024 examples: 11.5 / (1024 (1 + 1 / (1 - 0.85))) * 1024 = 1.5, and
        # its decoupled decay 0.0153 * 1024 / (1024 (1 + 1 / (1 - 0.85))) over that rate is 0.00133.
        "fast": Recipe(
            model="fastnet",
            epochs=16,
            batch_size=1024,
            learning_rate=1.5,
            bias_learning_rate_factor=64,
            momentum=0.85,
            weight_decay=0.00133,
            schedule="one-cycle",
            warmup_epochs=3,
            flip=True,
            crop_padding=2,
            label_smoothing=0.2,
            precision="bfloat16",
        ),
    }
)
