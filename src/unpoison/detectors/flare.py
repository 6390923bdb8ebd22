"""FLARE: abnormal activations of all layers form a group of their own, which is more stable than the rest.

Hou, Luo, Hua, Chen, Zhang and Li, "FLARE: Toward Universal Dataset Purification against Backdoor Attacks"
(IEEE TIFS 2025, arXiv 2411.19479). Made for attacks whose poison is not separated in the last layer alone,
such as all-to-all ones. Stages:

1. representation: what each batch norm is given, standardised by its own running mean and variance, so that
   layers are on one scale; of each channel the value that is farthest from 0 in the image. The
   representations of all layers stand side by side;
2. subspace: the layers from the first to the k-th, for k from all of them downwards. In each the whole set is
   clustered by density (HDBSCAN); the one is taken in whose first split into two clusters the smaller one is
   the most stable;
3. stability: of a cluster, the mean over its examples of by how much density (one over distance) rises from
   where the cluster appears to where the example leaves it, in units of the former. The more stable cluster
   is poison, as poison shares a trigger.

Departures: the paper reduces representations by UMAP first; here `dimensions` principal components are
clustered, which need no optimisation. Its constants for clusters are not taken over: a cluster has at least
.5 % of the set (`smallest_share`) and an example 5 neighbours (`neighbours`). Nothing is flagged where the
more stable cluster is the larger one, or where two clusters hold less than half of the set. A network without
batch norms is read at the outputs of its convolutions and linear layers but the last, standardised over the
set, of which the largest value of each channel is taken.

Cost: one forward pass, and n^2 `dimensions` multiplications for each layer. Memory: n numbers for each
channel of all layers, and `block_bytes` of distances.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor, nn

from unpoison._inputs import placed
from unpoison._option_checks import check_options
from unpoison.detectors._density import Split, first_split
from unpoison.detectors._estimates import Measured
from unpoison.detectors._findings import Findings
from unpoison.detectors._methods import register
from unpoison.detectors._representations import last_module, principal
from unpoison.detectors._search import Search, Searcher
from unpoison.errors import InputError
from unpoison.influence import Parts
from unpoison.models import forward, preserved, usual_mode
from unpoison.registry import Presets

_LEAST_HELD: Final = 0.5


@final
@register(
    name="flare",
    title="FLARE",
    summary="Flags the more stable of two clusters of the abnormal activations of all layers.",
    paper="Hou et al. 2025, arXiv 2411.19479",
    cost="one forward pass, and the distances of all pairs for each layer",
    presets=("default",),
    can_find_nothing=True,
)
@dataclass(frozen=True, kw_only=True)
class Flare(Searcher):
    """Flag the more stable of two clusters, in the subspace of layers that divides the set best.

    Arguments:
        dimensions: principal components that are clustered.
        neighbours: of an example, the distance to the farthest of which is one over its density.
        smallest_share: of the set that a cluster has at least.
        batch_size: images of a forward pass.
        block_bytes: of distances at a time.
    """

    PRESETS: ClassVar[Presets] = {"default": {}}

    dimensions: int = 10
    neighbours: int = 5
    smallest_share: float = 0.005
    batch_size: int = 512
    block_bytes: int = 1 << 26

    def __post_init__(self) -> None:
        check_options(
            self.method.name,
            self,
            dimensions="[1, inf)",
            neighbours="[1, inf)",
            smallest_share="(0, 0.5]",
            batch_size="[1, inf)",
            block_bytes="[1, inf)",
        )

    def memory_needed(self, measured: Measured) -> Parts:
        """See `Detector.memory_needed`."""
        few = measured.training_set.subset([0])
        numbers = sum(one.shape[1] for one in _representations(measured.model, few, 1))
        rows, batch = measured.examples, min(self.batch_size, measured.examples)
        return {
            "representations": 4 * 4 * rows * numbers + 8 * 3 * numbers**2,
            "activations": measured.activations.reading(batch),
            **measured.distances(self, rows),
        }

    def search(self, search: Search) -> Findings:
        """See the module's docstring."""
        layers = _representations(search.model, search.training_set, self.batch_size, search)
        search.lap("features")
        count, total = len(search.training_set), len(layers)
        ends = torch.tensor([one.shape[1] for one in layers]).cumsum(0).tolist()
        joint = torch.cat(layers, 1).double()
        del layers
        joint -= joint.mean(0)
        smallest = max(2, round(self.smallest_share * count))
        best: tuple[int, Tensor, Split] | None = None
        for kept in range(total, 0, -1):
            centred = joint[:, : ends[kept - 1]]
            points = centred @ principal(centred, self.dimensions)[1]
            split = first_split(
                points, neighbours=self.neighbours, smallest=smallest, block_bytes=self.block_bytes
            )
            if split is not None and (best is None or split.strength > best[2].strength):
                best = kept, points.cpu(), split
            if search.progress is not None:
                search.progress("clusters", total - kept + 1, total)
        scores, stable = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        how = "no subspace of layers divides the set into two clusters"
        if best is not None:
            kept, points, split = best
            poison, stability = split.more_stable
            centre = points[poison].mean(0)
            distance = torch.linalg.vector_norm(points - centre, dim=1)
            near = 1 / (1 + distance / distance[poison].mean().clamp(min=1e-12))
            member = torch.zeros(count, dtype=torch.bool)
            member[poison] = True
            scores = torch.where(member, 0.5 + near / 2, near / 2)
            how = (
                f"in the more stable of the two clusters of {split.held} examples, by the first {kept} of "
                f"{total} layers"
            )
            stable[poison] = stability
            if split.held < _LEAST_HELD * count or not split.smaller_is_more_stable:
                scores, how = scores - 1, f"{how}; it is no minority of most of the set"
        return search.findings(
            scores=scores,
            threshold=0.5,
            how=how,
            words="are a stable cluster of abnormal activations",
            evidence={"stability": stable},
        )


def _representations(
    model: nn.Module, examples: Any, batch_size: int, search: Search | None = None
) -> list[Tensor]:
    """Float32[n c] of each layer, in the order of the forward pass.

    Raises:
        InputError: the network has no layers to read, or a value is not a finite number.
    """
    device = next((one.device for one in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    norms = [
        one
        for one in model.modules()
        if isinstance(one, nn.modules.batchnorm._BatchNorm) and one.running_mean is not None
    ]
    last = "" if norms else last_module(model, placed(examples.at([0])[0], device))
    others = [
        one
        for name, one in model.named_modules()
        if name != last and isinstance(one, nn.modules.conv._ConvNd | nn.Linear)
    ]
    read: dict[nn.Module, Tensor] = {}
    rows: dict[nn.Module, list[Tensor]] = {}

    def of_norm(module: Any, given: tuple[Any, ...], _: object) -> None:
        channels = given[0].detach().float().flatten(2) if given[0].ndim > 2 else given[0].float()[:, :, None]
        mean, scale = module.running_mean.float(), (module.running_var.float() + module.eps).sqrt()
        standard = (channels - mean[:, None]) / scale[:, None]
        place = standard.abs().argmax(2, keepdim=True)
        read[module] = standard.gather(2, place)[:, :, 0]

    def of_other(module: nn.Module, _: tuple[Any, ...], output: Tensor) -> None:
        value = output.detach().float()
        if isinstance(module, nn.Linear):
            read[module] = value.flatten(1, -2).amax(1) if value.ndim > 2 else value
        else:
            read[module] = value.flatten(2).amax(2)

    with usual_mode(device), preserved(model), torch.no_grad(), contextlib.ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for one in norms or others:
            one.register_forward_hook(of_norm if norms else of_other)
        done = 0
        for inputs, *_ in examples.in_batches(batch_size):
            read.clear()
            forward(model, placed(inputs, device))
            for module, value in read.items():
                bad = (~torch.isfinite(value)).any(1).nonzero()
                if len(bad):
                    raise InputError(
                        f"{examples.name}: the features of example {done + int(bad[0])} in some layer are "
                        "not finite numbers; train the model anew"
                    )
                rows.setdefault(module, []).append(value)
            done += len(next(iter(read.values()), ()))
            if search is not None and search.progress is not None and read:
                search.progress("features", done, len(examples))
    if not rows:
        raise InputError(
            "flare: reads batch norms, convolutions or linear layers before the last, and the model has none"
        )
    found = [torch.cat(parts) for parts in rows.values()]
    if norms:
        return found
    return [(one - one.mean(0)) / one.std(0, correction=0).clamp(min=1e-6) for one in found]
