"""Artifact mixture: the examples whose pixels were optimised, learned from those that are surely poison.

Clean-label poison carries its cause in its pixels: each image was optimised on its own, and the gradients of
two of them need not resemble each other (seed expansion, the other half of `calibrated`, relies on that).
But optimisation leaves artifacts: noise where the image is flat, and a displacement in feature space that
does not survive recompression or a shift, as in the defense against such poison by recompression. What the
artifacts of this attack look like is learned from a few seeds. Stages:

1. seeds      here the examples with the answered label of the highest influence on the observation,
              normalised (l-RelatIF; Barshan, Brunet and Dziugaite, 2020): v^T P g / sqrt(g^T P g) with the
              query v, the inverse curvature P and the training gradient g of the margin. `calibrated` gives
              its own seeds.
2. features   of every candidate, an example with the label of a seed: its noise level in the flattest quarter
              of the image, and how far its penultimate features move under JPEG and under a shift of one
              pixel; all as logarithms, minus the median of the class, divided by its median absolute
              deviation; of the two displacements, which carry nearly the same information, the mean.
3. mixture    of two normal distributions with one covariance, in the space of displacement, noise and
              influence (as normal scores, so that the seeds, which were chosen by it, do not outweigh the
              rest), by expectation and maximisation (Dempster, Laird and Rubin, 1977) with the seeds known to
              belong to the first component (semi-supervised, as in Nigam et al., 2000). It starts from the
              seeds alone, and from the candidates of much displacement, of much noise, and of much of both;
              the likeliest end counts.
4. gate       the first component must have more displacement or more noise by two deviations, the distance at
              which two components separate cleanly (Ashman, Bird and Zepf, 1994), and three in five of the
              seeds must belong to it by themselves; else the artifacts say nothing.
5. score      = the log-odds of belonging to the first component; above 0 an example is flagged.

Cost: the factors and scores of one query (three passes with per-example gradients), three forward passes of
the candidates, and their recompression. Limits: poison without noise (colours, smooth patterns, perturbations
far below 16/255) shows no artifacts; poison crafted to survive JPEG and shifts is left with its noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Final, final

import torch
from torch import Tensor, nn

from unpoison._option_checks import check_options
from unpoison._progress import Progress
from unpoison._recompression import grain, recompressed
from unpoison.data import TrainingSet
from unpoison.detectors._estimates import Measured
from unpoison.detectors._findings import Findings
from unpoison.detectors._methods import register
from unpoison.detectors._representations import Reader
from unpoison.detectors._search import OF_INFLUENCE, Search, Searcher
from unpoison.influence import FACTOR_EXAMPLES, Damping, Parts, RelativeDamping

_DAMPING = RelativeDamping(0.1)
_FEWEST: Final = 5  # members that a component can be learned from
_FLATTEST: Final = 0.25  # of the image, where noise is measured
_QUALITY: Final = 75  # of JPEG
# The next four were chosen on twelve hits of gradient matching, half of them through JPEG;
# docs/delta_influence.md says how many fits pass the gate with each of them halved and doubled.
_SEPARATION: Final = 2.0  # deviations between the components
_SEEDS_INSIDE: Final = 0.6  # share of the seeds that belong to the first component by themselves
_MUCH: Final = 1.5  # deviations above the median, from which a mixture starts
_RIDGE: Final = 0.1  # of the covariance
_FARTHEST: Final = 6.0  # deviations from the median; more carries no further information


@final
@register(
    name="artifact-mixture",
    title="Artifact mixture",
    summary="Flags the examples with the pixel artifacts of those with the most influence on the answer.",
    paper="ours",
    cost="three passes with per-example gradients, three forward passes of one class",
    needs_observation=True,
    can_find_nothing=True,
)
@dataclass(frozen=True, kw_only=True)
class ArtifactMixture(Searcher):
    """Flag the examples that were optimised like those with the most influence on one wrong prediction.

    Arguments:
        seeds: how many of the examples with the most influence are taken for poison, at least 5.
        damping: of the curvature.
        modules: which modules' parameters to track; all linear and convolution layers by default.
        covariance_examples: fit the covariances to this many examples; to all when None.
        eigenvalue_examples: fit the eigenvalues to this many examples; to all when None.
        batch_size: examples of a forward pass.

    Raises:
        InputError: a setting is out of range.
    """

    seeds: int = 10
    damping: Damping = _DAMPING
    modules: tuple[str, ...] | None = None
    covariance_examples: int | None = FACTOR_EXAMPLES
    eigenvalue_examples: int | None = FACTOR_EXAMPLES
    batch_size: int = 128

    def __post_init__(self) -> None:
        check_options(
            self.method.name,
            self,
            seeds="[5, inf)",
            **OF_INFLUENCE,
        )

    def memory_needed(self, measured: Measured) -> Parts:
        """See `Detector.memory_needed`."""
        return measured.influence(self, queries=1, asked=measured.observed)

    def search(self, search: Search) -> Findings:
        """See the module's docstring."""
        pictures = search.pictures
        scores = search.influence_on_the_answer(gradient="measurement", self_influence=True)
        assert scores.self_influence is not None
        length = scores.self_influence.sqrt()
        influence = torch.where(length > 0, scores.values[0] / length, 0).cpu()
        candidates = search.training_set.labels.cpu() == search.answer
        ranking = influence.argsort(descending=True, stable=True)
        seeds = ranking[candidates[ranking]][: self.seeds]
        log_odds = artifact_mixture(
            search.model,
            pictures,
            seeds,
            candidates,
            influence,
            batch_size=self.batch_size,
            progress=search.progress,
        )
        search.lap("artifact features")
        if log_odds is None:  # below the threshold, in the order of influence
            log_odds = _normal_scores(influence).mul(0.1).tanh() - 1
        return search.findings(
            scores=log_odds,
            threshold=0.0,
            how=f"more likely than not in one component with the {len(seeds)} examples of most influence, "
            "by noise and by displacement under recompression and a shift",
            words="have the artifacts of the examples with the most influence on the answer",
            evidence={"influence_before": influence},
        )


def artifact_mixture(
    model: nn.Module,
    training_set: TrainingSet,
    seeds: Tensor,
    candidates: Tensor,
    influence: Tensor,
    *,
    batch_size: int,
    progress: Progress | None = None,
    features: Tensor | None = None,
) -> Tensor | None:
    """Float64[n]: the log-odds of having the artifacts of the seeds; None where the seeds show none.

    Other examples come after all candidates, in the order of `influence`.

    Arguments:
        model: that was trained on the set.
        training_set: the examples.
        seeds: Int64[k], taken for poison. Where they are fewer than five, the candidates of the highest
            influence are added.
        candidates: Bool[n], the examples that may be flagged, those with the label of a seed.
        influence: Float[n], by which the seeds were chosen.
        batch_size: images of a forward pass.
        progress: called with "features", examples done and examples to do.
        features: of the candidates, `artifact_features`; measured when None.
    """
    rows = candidates.nonzero()[:, 0]
    labels = training_set.labels.cpu()[rows]
    if len(rows) < 4 * _FEWEST:
        return None
    known = torch.zeros(len(rows), dtype=torch.bool)
    known[influence[rows].argsort(descending=True, stable=True)[: max(_FEWEST, len(seeds))]] = True
    known |= torch.isin(rows, seeds)
    if int(known.sum()) > len(rows) // 2:
        return None

    if features is None:
        features = artifact_features(model, training_set.subset(rows), batch_size, progress)
    features, attributed = features.clone(), influence[rows].double()
    for label in torch.unique(labels):
        group = labels == label
        features[group] = _standardised(features[group])
        attributed[group] = _normal_scores(attributed[group])
    artifacts = torch.stack([features[:, :-1].mean(1), features[:, -1]], 1)
    points = torch.cat([artifacts, attributed[:, None]], 1)
    much = torch.cat([artifacts, artifacts.sum(1, keepdim=True) / math.sqrt(2)], 1) > _MUCH
    starts = [known, *(much | known[:, None]).unbind(1)]
    mixture = max(
        (two_components(points, known, start.double()) for start in starts), key=attrgetter("likelihood")
    )
    inside = (mixture.log_odds[known] > 0).double().mean()
    if not (float(mixture.distance[:2].max()) > _SEPARATION and float(inside) >= _SEEDS_INSIDE):
        return None
    scores = mixture.log_odds.min() - 2 + _normal_scores(influence).mul(0.1).tanh()
    scores[rows] = mixture.log_odds
    return scores


@final
@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture of two normal distributions with one covariance.

    Arguments:
        log_odds: Float64[n], of each point to belong to the first component.
        likelihood: the logarithm of the likelihood of all points.
        distance: Float64[d], how far the first component's mean lies above the second's, in deviations.
    """

    log_odds: Tensor
    likelihood: float
    distance: Tensor


def two_components(points: Tensor, known: Tensor, start: Tensor, *, rounds: int = 300) -> Mixture:
    """Fit a mixture to Float[n d] `points` of which some are `known` to belong to the first component.

    The first component takes at most half of all points.

    Arguments:
        points: Float[n d].
        known: Bool[n], the points that belong to the first component for certain.
        start: Float64[n], the probabilities to begin with.
        rounds: of expectation and maximisation, at most.

    >>> points = torch.tensor([[0.0], [0.2], [-0.1], [0.1], [-0.2], [0.0], [5.0], [5.2], [4.9]])
    >>> known = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 1], dtype=torch.bool)
    >>> (two_components(points, known, known.double()).log_odds > 0).tolist()
    [False, False, False, False, False, False, True, True, True]
    """
    points, belonging = points.double(), start.double()
    count, width = points.shape
    # The ridge keeps a direction without variance from deciding.
    ridge = _RIDGE * torch.eye(width, dtype=torch.float64)
    mixture = Mixture(belonging, -math.inf, torch.zeros(width, dtype=torch.float64))
    for _ in range(rounds):
        weights = torch.stack([belonging, 1 - belonging])
        means = weights @ points / weights.sum(1, keepdim=True)
        away = points - means[:, None]
        scatter = (weights[..., None] * away).flatten(0, 1).t() @ away.flatten(0, 1)
        covariance = scatter / count + ridge
        inner = ((away @ torch.linalg.inv(covariance)) * away).sum(2)
        share = (belonging.sum() / count).clamp(max=0.5)
        first, second = torch.stack([share, 1 - share]).log()[:, None] - inner / 2
        each = torch.where(known, first, torch.logaddexp(first, second)) - torch.logdet(covariance) / 2
        distance = (means[0] - means[1]) / covariance.diagonal().sqrt()
        mixture = Mixture(first - second, float(each.sum()), distance)
        updated = mixture.log_odds.sigmoid().where(~known, 1.0)
        settled = float((updated - belonging).abs().max()) < 1e-6
        belonging = updated
        if settled:
            break
    return mixture


def artifact_features(
    model: nn.Module, examples: TrainingSet, batch_size: int, progress: Progress | None
) -> Tensor:
    """Float64[n 3]: the displacements under JPEG (with 1 or 3 channels) and shift, and the noise level.

    As logarithms. They depend on the model and the examples alone, not on an answer.
    """
    images = examples.images
    views = [images.roll((1, 1), (2, 3))]
    if images.shape[1] in (1, 3):
        views.insert(0, recompressed(images, quality=_QUALITY))
    before = Reader(model, examples, module=None, batch_size=batch_size, progress=progress)
    readers = [before.of(replace(examples, images=view)) for view in views]
    columns = [torch.zeros(len(examples), dtype=torch.float64) for _ in readers]
    both = zip(before.in_order(), *(reader.in_order() for reader in readers), strict=True)
    for (start, seen), *others in both:
        for column, (_, moved) in zip(columns, others, strict=True):
            distances = torch.linalg.vector_norm((moved - seen).flatten(1), dim=1)
            column[start : start + len(seen)] = distances.double().cpu()
    grains = torch.cat(
        [grain(part.float() / 255, quantile=_FLATTEST).cpu() for part in torch.split(images, batch_size)]
    )
    # A noise level of one 8-bit step is rounding.
    return torch.stack([*(column.clamp(min=1e-6).log() for column in columns), (grains + 1).log()], 1)


def _standardised(columns: Tensor) -> Tensor:
    """Minus the median, divided by the median absolute deviation, or by a fifth of the standard deviation
    where most values are equal."""
    centred = columns - columns.median(0).values
    unit = torch.maximum(1.4826 * centred.abs().median(0).values, 0.2 * columns.std(0, correction=0))
    return (centred / unit.clamp(min=1e-9)).clamp(-_FARTHEST, _FARTHEST)


def _normal_scores(values: Tensor) -> Tensor:
    """Float64[n]: the quantiles of a normal distribution at the ranks of Float[n]."""
    ranks = values.argsort(stable=True).argsort().double()
    scores: Tensor = torch.special.ndtri((ranks + 0.5) / len(values))
    return scores
