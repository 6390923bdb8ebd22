"""JPEG: recompress the training set once, so that what no eye sees is gone.

Das et al., "Keeping the Bad Guys Out: Protecting and Vaccinating Deep Learning with JPEG Compression" (2017,
arXiv 1705.02900), for attacks at test time; against poison it stands in the tables of PureGen (Bhat et al.
2024, arXiv 2405.18627) at qualities 25 and 75.

Each image is encoded and decoded in memory by Pillow, colour images with its subsampling of colour. Test
images are left as they are.

Cost: once, some 15,000 images of 32x32 a second and core.

Limits: an adversary who knows of it compresses while crafting. It takes detail from clean images too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

from unpoison._squeezing import recompressed
from unpoison.data import TrainingSet
from unpoison.defenses._methods import register
from unpoison.errors import InputError
from unpoison.registry import Presets
from unpoison.training import Defense, Recipe


@final
@register(
    name="jpeg",
    title="JPEG recompression",
    summary="Recompresses every training image once.",
    paper="Das et al. 2017, arXiv 1705.02900; against poison Bhat et al. 2024, arXiv 2405.18627",
    cost="seconds for 50,000 images of 32x32",
    presets=("quality-75", "quality-25"),
)
@dataclass(frozen=True, kw_only=True)
class JPEG(Defense):
    """Recompression of every training image.

    Arguments:
        quality: of the encoder, 1 (worst) to 95.

    Raises:
        InputError: the quality is out of its range.
    """

    PRESETS: ClassVar[Presets] = {
        "quality-75": {},
        "quality-25": {"quality": 25},
    }

    quality: int = 75

    def __post_init__(self) -> None:
        if isinstance(self.quality, bool) or not isinstance(self.quality, int) or not 1 <= self.quality <= 95:
            raise InputError(f"jpeg: quality must be a whole number in 1..95, found {self.quality!r}")

    def begin(self, training_set: TrainingSet, recipe: Recipe, *, seed: int) -> TrainingSet:
        """The set with every image recompressed.

        Raises:
            InputError: the images have neither one channel nor three.
        """
        return replace(training_set, images=recompressed(training_set.images, quality=self.quality))
