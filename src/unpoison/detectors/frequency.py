"""The frequency detector: triggers have high frequencies that photographs do not have.

Zeng, Park, Mao and Jia, "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective" (ICCV 2021,
arXiv 2104.03413). A small convolutional network learns to distinguish the discrete cosine transforms of
images from those of the same images with synthetic triggers, and is then applied to the training set. Stages:

1. synthetic triggers: each image gets one of five, drawn for it: a white block, a block of noise (2 to 7
   pixels wide), Gaussian noise of mean 25 in 255, a shadow over a part cut off by a line, or another image
   blended in with weight .3;
2. transform: two-dimensional DCT-II, orthonormal, of each channel of the image in [0, 1];
3. network: six convolutions (32, 32, 64, 64, 128, 128 channels; ELU, batch norm), max-pooling and dropout
   (.2, .3, .4) after every second, one linear layer; Adadelta, learning rate .05, weight decay 1e-4;
4. score: the probability of a trigger; above .5 an example is flagged.

The model plays no part. The classifier is trained on `reference` where there is one, else on the training set
itself (most of which is clean). A trained classifier is for images of one shape, and can be saved and used
again: `fit_classifier`, `FrequencyClassifier.save`, and the option `classifier`, the directory of a saved
one.

Presets: `quick`, ours and the default, learns from at most 2,000 images for 6 passes, with triggers drawn
anew in each. `original` takes the published 5 rounds of 10 passes in batches of 64 (triggers are drawn anew
each round). `comparison` is what the published comparison with Delta-Influence used (notebooks of arXiv
2411.13731): 10 passes over one set of triggers in batches of 256, and a fault of its code, by which the
classifier is trained on images in [0, 1] and applied to images standardised by channel, where it flags
about a tenth of any set. The other presets train and apply it on the same scale. Departures: the published
code multiplies 8-bit values by 255 first, which only changes the scale; pooling rounds up, so that images of
any size fit.

Cost: training takes some 3 * 38 million multiplications for a 32x32 colour image, its triggered copy and each
pass; scoring a third of one pass. Memory: the images that it is trained on, and the activations of one batch.
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from unpoison._artefacts import atomic_directory, read_record, write_json
from unpoison._option_checks import check_options
from unpoison._progress import Progress
from unpoison._seeds import generator
from unpoison.data import TrainingSet, as_training_set
from unpoison.detectors._estimates import Measured
from unpoison.detectors._findings import Findings
from unpoison.detectors._methods import register
from unpoison.detectors._search import Search, Searcher
from unpoison.errors import InputError, one_line
from unpoison.influence import Parts
from unpoison.registry import Presets

_FORMAT = 1
_CHANNELS = (32, 32, 64, 64, 128, 128)
_DROPOUT = (0.2, 0.3, 0.4)


@final
@register(
    name="frequency",
    title="Frequency detector",
    summary="Flags the images whose cosine transform is classified as that of an image with a trigger.",
    paper="Zeng et al. 2021, arXiv 2104.03413",
    cost="training a small network, unless a trained one is given",
    presets=("quick", "original", "comparison"),
    uses_reference=True,
)
@dataclass(frozen=True, kw_only=True)
class Frequency(Searcher):
    """Flag the images whose spectrum is classified as that of an image with a trigger.

    Arguments:
        examples: how many images to train on, at most; None for all.
        rounds: how often triggers are drawn anew.
        epochs: passes over the images in each round.
        batch_size: images of a training step, each with a triggered copy; also of a scoring pass.
        standardize: apply the classifier to images standardised by channel, unlike those it was trained on,
            as the published comparison does by mistake.
        threshold: the probability above which an example is flagged.
        classifier: the directory of a saved classifier, in place of training one.

    >>> from unpoison import detectors
    >>> detectors.get("frequency", preset="original").rounds
    5
    """

    PRESETS: ClassVar[Presets] = {
        "quick": {},
        "original": {"examples": None, "rounds": 5, "epochs": 10},
        "comparison": {"examples": None, "rounds": 1, "epochs": 10, "batch_size": 256, "standardize": True},
    }

    examples: int | None = 2000
    rounds: int = 6
    epochs: int = 1
    batch_size: int = 64
    standardize: bool = False
    threshold: float = 0.5
    classifier: str | None = None

    def __post_init__(self) -> None:
        check_options(
            self.method.name,
            self,
            examples="[1, inf)",
            rounds="[1, inf)",
            epochs="[1, inf)",
            batch_size="[1, inf)",
            threshold="[0, 1]",
        )

    def memory_needed(self, measured: Measured) -> Parts:
        """See `Detector.memory_needed`."""
        pixels = measured.numbers
        learned = min(measured.examples, self.examples or measured.examples)
        # Outputs of convolution, activation and norm: 6 x 32 for each pixel, 6 x 64 for each fourth, ...
        step = 2 * self.batch_size * 4 * (6 * 32 + 6 * 64 // 4 + 6 * 128 // 16) * pixels // 3
        scored = min(max(self.batch_size, 256), measured.examples) * 4 * 4 * 32 * pixels // 3
        return {"images": 4 * 3 * learned * pixels, "activations": max(step, scored)}

    def search(self, search: Search) -> Findings:
        """See the module's docstring; of the model only the device is used."""
        if self.classifier is not None:
            classifier = FrequencyClassifier.load(self.classifier)
        else:
            examples = search.pictures if search.reference is None else as_training_set(search.reference)
            classifier = self.fit_classifier(
                examples, seed=search.seed, device=search.device, progress=search.progress
            )
        search.lap("training")
        scores = classifier.to(search.device).probabilities(
            search.pictures,
            batch_size=max(self.batch_size, 256),
            standardize=self.standardize,
            progress=search.progress,
        )
        return search.findings(
            scores=scores,
            threshold=self.threshold,
            how="probability of a trigger, by a classifier of spectra; given in advance",
            words="have the spectrum of an image with a trigger",
        )

    def fit_classifier(
        self,
        examples: TrainingSet,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> FrequencyClassifier:
        """Train a classifier of spectra on images that are mostly clean.

        Arguments:
            examples: the images; labels are not used.
            seed: of triggers, first weights, order and dropout.
            device: where to train.
            progress: called with "training", steps done and steps to do.

        Raises:
            InputError: there are no examples.
        """
        if not len(examples):
            raise InputError(f"{examples.name}: there are no images to train on")
        order = generator(seed, "frequency", "order")
        chosen = torch.randperm(len(examples), generator=order)[: self.examples]
        images = examples.images[chosen.to(examples.device)].to(device).float().div_(255)
        network = _Network(examples.image_shape, generator(seed, "frequency", "weights")).to(device)
        optimizer = torch.optim.Adadelta(network.parameters(), lr=0.05, weight_decay=1e-4)
        randomness = generator(seed, "frequency", "triggers", device=device)
        steps = math.ceil(len(images) / self.batch_size)
        total, done = self.rounds * self.epochs * steps, 0
        triggered = images
        for epoch in range(self.rounds * self.epochs):
            if epoch % self.epochs == 0:
                triggered = torch.cat(
                    [synthetic_triggers(part, images, randomness) for part in torch.split(images, 1024)]
                )
            for rows in torch.split(torch.randperm(len(images), generator=order), self.batch_size):
                rows = rows.to(device)
                inputs = spectrum(torch.cat([images[rows], triggered[rows]]))
                targets = torch.arange(2, device=device).repeat_interleave(len(rows))
                loss = functional.cross_entropy(network(inputs, randomness), targets)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                optimizer.step()
                done += 1
                if progress is not None:
                    progress("training", done, total)
        network.eval().requires_grad_(False)
        return FrequencyClassifier(network, examples.image_shape)


@final
class FrequencyClassifier:
    """Classifies the spectra of images as with or without a trigger, for images of one shape.

    Arguments:
        network: Float[b c h w] spectra to Float[b 2] logits.
        image_shape: channels, height and width.
    """

    def __init__(self, network: nn.Module, image_shape: tuple[int, int, int]) -> None:
        self.network, self.image_shape = network, image_shape

    def to(self, device: torch.device | str) -> FrequencyClassifier:
        """The same classifier, moved."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def probabilities(
        self,
        examples: TrainingSet,
        *,
        batch_size: int = 256,
        standardize: bool = False,
        progress: Progress | None = None,
    ) -> Tensor:
        """Float64[n] in [0, 1]: the probability that each image has a trigger.

        Arguments:
            examples: read once, in consecutive batches.
            batch_size: images of a forward pass.
            standardize: by channel, first; see the preset `comparison`.
            progress: called with "scores", examples done and examples to do.

        Raises:
            InputError: the images are of another shape than the classifier's.
        """
        if examples.image_shape != self.image_shape:
            raise InputError(
                f"{examples.name}: this frequency classifier is for images of shape {self.image_shape}, "
                f"found {examples.image_shape}; train one for these"
            )
        device = next(self.network.parameters()).device
        mean, std = (torch.tensor(part, device=device)[:, None, None] for part in examples.channel_statistics)
        rows = []
        for start in range(0, len(examples), batch_size):
            images = examples.images[start : start + batch_size].to(device).float().div_(255)
            inputs = spectrum((images - mean) / std if standardize else images)
            rows.append(self.network(inputs).softmax(1)[:, 1].double().cpu())
            if progress is not None:
                progress("scores", min(start + batch_size, len(examples)), len(examples))
        return torch.cat(rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the classifier to the directory `path`, in one step."""
        with atomic_directory(path) as staging:
            state = {key: value.cpu().contiguous() for key, value in self.network.state_dict().items()}
            save_file(state, staging / "frequency.safetensors")
            write_json(staging / "frequency.json", {"format": _FORMAT, "image_shape": list(self.image_shape)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FrequencyClassifier:
        """Read a classifier that `save` wrote; it lies in main memory.

        Raises:
            InputError: the directory does not hold one, or it is damaged.
        """
        folder = Path(path)
        record = read_record(folder / "frequency.json", _FORMAT, "frequency classifiers")
        try:
            channels, height, width = record["image_shape"]
            network = _Network((channels, height, width), torch.Generator())
            network.load_state_dict(load_file(folder / "frequency.safetensors"))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{folder}: damaged frequency classifier ({one_line(error)})") from None
        network.eval().requires_grad_(False)
        return cls(network, (channels, height, width))


@final
class _Network(nn.Module):
    """Six convolutions and a linear layer. Dropout uses the generator that is given with the batch."""

    def __init__(self, image_shape: tuple[int, int, int], weights: torch.Generator) -> None:
        super().__init__()
        channels, height, width = image_shape
        with torch.random.fork_rng(devices=[]):
            sizes = (channels, *_CHANNELS)
            self.convolutions = nn.ModuleList(
                nn.Conv2d(inputs, outputs, 3, padding=1) for inputs, outputs in itertools.pairwise(sizes)
            )
            self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for outputs in _CHANNELS)
            for _ in _DROPOUT:
                height, width = math.ceil(height / 2), math.ceil(width / 2)
            self.head = nn.Linear(_CHANNELS[-1] * height * width, 2)
        # The initialisation of torch, but from the given generator.
        for layer in (*self.convolutions, self.head):
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            bound = 1 / math.sqrt(layer.weight[0].numel())
            for parameter in (layer.weight, layer.bias):
                assert parameter is not None
                nn.init.uniform_(parameter, -bound, bound, generator=weights)

    def forward(self, spectra: Tensor, randomness: torch.Generator | None = None) -> Tensor:
        """Logits Float[b 2] of Float[b c h w] spectra; with dropout in training mode."""
        hidden = spectra
        for place, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            hidden = norm(functional.elu(convolution(hidden)))
            if place % 2:
                hidden = functional.max_pool2d(hidden, 2, ceil_mode=True)
                if self.training:
                    kept = 1 - _DROPOUT[place // 2]
                    mask = torch.rand(hidden.shape, device=hidden.device, generator=randomness) < kept
                    hidden = hidden * mask / kept
        logits: Tensor = self.head(hidden.flatten(1))
        return logits


def spectrum(images: Tensor) -> Tensor:
    """Float[b c h w]: the orthonormal two-dimensional DCT-II of each channel of Float[b c h w] images.

    >>> spectrum(torch.ones(1, 1, 2, 2)).round(decimals=4).abs()
    tensor([[[[2., 0.],
              [0., 0.]]]])
    """
    height, width = images.shape[2:]
    return _cosines(height, images) @ images @ _cosines(width, images).t()


def _cosines(size: int, like: Tensor) -> Tensor:
    places = torch.arange(size, device=like.device, dtype=torch.float64)
    basis = torch.cos(math.pi / size * places[:, None] * (places[None] + 0.5)) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis.to(like.dtype)


def synthetic_triggers(images: Tensor, others: Tensor, randomness: torch.Generator) -> Tensor:
    """Float[b c h w] in [0, 1]: each of the images with one of five synthetic triggers.

    Arguments:
        images: Float[b c h w] in [0, 1].
        others: Float[m c h w], to blend in.
        randomness: on their device.
    """
    count, channels, height, width = images.shape
    device = images.device

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device, generator=randomness)

    rows = torch.arange(height, device=device)[None, :, None]
    columns = torch.arange(width, device=device)[None, None]
    # Blocks of 2 to 7 pixels, or as large as the image allows.
    side = (2 + (draw(count, 2) * 6).floor()).minimum(torch.tensor([height, width], device=device))
    place = (draw(count, 2) * (torch.tensor([height, width], device=device) - side + 1)).floor()
    top, left = place[:, 0, None, None], place[:, 1, None, None]
    inside = (rows >= top) & (rows < top + side[:, 0, None, None])
    block = (inside & (columns >= left) & (columns < left + side[:, 1, None, None]))[:, None]
    white = torch.where(block, 1.0, images)
    noise = torch.where(block, draw(count, channels, height, width), images)
    bell = torch.randn(count, channels, height, width, device=device, generator=randomness)
    grain = images + (25 + 25 * bell) / 255
    # A line through a point in the image, at any angle; one side of it is darkened.
    angle = 2 * math.pi * draw(count, 1, 1)
    away = (rows - height * draw(count, 1, 1)) * angle.sin() + (
        columns - width * draw(count, 1, 1)
    ) * angle.cos()
    shadow = torch.where((away > 0)[:, None], images * (0.4 + 0.4 * draw(count, 1, 1, 1)), images)
    partners = torch.randint(len(others), (count,), device=device, generator=randomness)
    blended = 0.7 * images + 0.3 * others[partners]
    kind = torch.randint(5, (count,), device=device, generator=randomness)
    variants = torch.stack([white, noise, grain, shadow, blended])
    return variants[kind, torch.arange(count, device=device)].clamp(0, 1)
