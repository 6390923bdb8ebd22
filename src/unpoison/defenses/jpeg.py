"""JPEG: recompress the training set once, which removes perturbations that are hardly visible.

Das et al., "Keeping the Bad Guys Out: Protecting and Vaccinating Deep Learning with JPEG Compression" (2017,
arXiv 1705.02900), for attacks at test time; measured against poison by Bhat et al. ("PureGen", 2024, arXiv
2405.18627) at qualities 25 and 75.

Each image is encoded and decoded in memory by Pillow, colour images with chroma subsampling. Test images are
not changed.

Cost: once, some 15,000 images of 32x32 a second and core.

Limits: an adaptive adversary compresses while crafting. Clean images lose detail, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, final

from unpoison._recompression import recompressed
from unpoison.data import TrainingSet
from unpoison.defenses._methods import register
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

    PRESETS: ClassVar[Presets] = {"quality-75": {}, "quality-25": {"quality": 25}}

    quality: Annotated[int, "[1, 95]"] = 75

    def begin(self, training_set: TrainingSet, recipe: Recipe, *, seed: int) -> TrainingSet:
        """The set with every image recompressed.

        Raises:
            InputError: the images have neither one channel nor three.
        """
        return replace(training_set, images=recompressed(training_set.images, quality=self.quality))
