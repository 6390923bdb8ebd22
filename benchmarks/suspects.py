"""Ten suspects of one network by an index, beside kronfluence, bergson and dattri.

    python -m benchmarks.suspects --network resnet9 --store suspects_resnet9 [--json]
    python -m benchmarks.suspects --network tokens --store suspects_tokens
    python -m benchmarks.suspects --network mlp --suspects 3 --store suspects_mlp

The 51 queries of each of several inputs (the input and 50 transformed ones, as Delta-Influence asks), one
input after another, on 5,000 training images. Every side begins with the network and the images alone. Peers
get the best of several batch sizes, ours its default, with factors of all images as theirs. bergson and
dattri have no part in `resnet9`: they take no convolutions.

- kronfluence 1.0: EK-FAC factors, then a pass over the training images for each input, with query gradients
  of rank 32 and whole;
- bergson 2.5: EK-FAC factors, then a pass for each input; and its index, which is another algorithm:
  gradients projected to 16 x 16 numbers a layer, their second moments as preconditioner, then products. It is
  made for language models, and takes layers whose input is Float[n t d];
- dattri 0.3: EK-FAC factors (of the true labels), then a pass for each input. It takes linear layers with one
  vector an example, so that it has a part in `mlp` alone;
- agreement: correlation of the differences of scores with those of ours.

bergson and dattri are no part of the extra `peers`: the one asks for torchaudio, bitsandbytes and others that
are not used here, the other is compared here alone.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks._harness import Bench, fastest, main, random_images
from benchmarks.influence import Kronfluence
from unpoison.influence import InfluenceIndex
from unpoison.models import build

Batch: TypeAlias = tuple[Tensor, Tensor]
COMBINE = torch.cat([-torch.ones(50, 1), torch.eye(50)], 1)
PROJECTION, DAMPING = 16, 0.1


class Tokens(nn.Module):
    """Images as Float[n t d], patches of a size; with size 0 the mean over tokens, Float[n d]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        if not self.size:
            return inputs.mean(1)
        return nn.functional.unfold(inputs, self.size, stride=self.size).mT


def network(name: str) -> Any:
    """`mlp` and `tokens` have linear layers alone: 183,562 and 205,322 parameters."""
    if name == "resnet9":
        return build(name, num_classes=10, width=8, seed=0).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "mlp":
            sizes = (192, 256, 256, 256)
            layers: list[nn.Module] = [nn.Sequential(nn.AvgPool2d(4), nn.Flatten())]
        else:
            sizes = (48, 128, 256, 128, 256, 128, 256, 128)
            layers = [Tokens(4)]
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.GELU()]
        last = nn.Linear(sizes[-1], 10)
        return nn.Sequential(*layers, last, *([Tokens(0)] if name == "tokens" else [])).eval()


def as_tokens(mlp: nn.Sequential) -> nn.Sequential:
    """The same layers on Float[n 1 d]."""
    first, *others = mlp
    return nn.Sequential(first, nn.Unflatten(1, (1, -1)), *others, nn.Flatten())


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """What `ClassificationTask` measures of a query."""
    chosen = torch.zeros_like(logits).scatter(1, labels[:, None], -torch.inf)
    return (logits + chosen).logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each example."""
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def sampled(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each example with a label that the network draws."""
    return losses(logits, torch.multinomial(logits.detach().softmax(1), 1)[:, 0])


def ours(model: nn.Module, training_set: Any, asked: list[Batch]) -> list[Tensor]:
    """Float[50 n] of each input; factors of all images and gradients of the loss, as the peers have them."""
    alike = {"covariance_examples": None, "eigenvalue_examples": None, "gradient": "loss"}
    with tempfile.TemporaryDirectory() as folder:
        index = InfluenceIndex.build(folder, model, training_set, **alike)
        return [index.influence(index.queries(model, one, combine=COMBINE)) for one in asked]


def by_kronfluence(
    peer: Kronfluence, asked: list[Batch], batch: int, rank: int | None = None
) -> list[Tensor]:
    """Float[50 n] of each input."""
    factors, loaded = peer.fit(batch), [TensorDataset(*one) for one in asked]
    return [COMBINE @ peer.scores(factors, one, batch, None, rank).float() for one in loaded]


def by_dattri(model: nn.Module, train: TensorDataset, asked: list[Batch], batch: int) -> list[Tensor]:
    """Float[50 n] of each input."""
    from dattri.algorithm.influence_function import IFAttributorEKFAC
    from dattri.task import AttributionTask

    model = copy.deepcopy(model)

    def logits(parameters: Any, images: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (images.reshape(-1, 3, 32, 32),))

    def loss(parameters: Any, data: Batch) -> Tensor:
        return nn.functional.cross_entropy(logits(parameters, data[0]), data[1].flatten())

    def target(parameters: Any, data: Batch) -> Tensor:
        return margins(logits(parameters, data[0]), data[1].flatten()).sum()

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    task = AttributionTask(loss, model, model.state_dict(), target_func=target)
    attributor = IFAttributorEKFAC(task, linear)
    loader = DataLoader(train, batch)
    task.target_func, kept = task.loss_func, task.target_func  # it fits factors to what queries are asked
    attributor.cache(loader)
    task.target_func = kept
    for values in attributor.cached_lambdas.values():  # its damping is one number for all layers
        values += DAMPING * values.mean()
    loaded = [DataLoader(TensorDataset(*one), len(one[0])) for one in asked]
    return [COMBINE @ attributor.attribute(loader, one).T for one in loaded]


class Bergson:
    """What its commands do for language models, for a network of images, in memory."""

    def __init__(self, model: nn.Module, train: TensorDataset) -> None:
        self.model, self.train = copy.deepcopy(model), train
        self.model.device = torch.device("cpu")  # type: ignore[assignment]

    def read(self, collector: Any, data: TensorDataset, loss: Callable[..., Tensor], batch: int) -> Any:
        """Show it gradients of the loss at all examples."""
        for first in range(0, len(data), batch):
            images, labels = data[first : first + batch]
            tokens = self.model[0](images).shape[1] if isinstance(self.model[0], Tokens) else 1
            with collector.with_batch(torch.ones(len(images), tokens, dtype=torch.bool)):
                values = loss(self.model(images), labels)
                values.sum().backward()
            self.model.zero_grad()
            collector.process_batch(list(range(first, first + len(labels))), losses=values)
        collector.teardown()
        return collector

    def gradients(self, data: TensorDataset, loss: Callable[..., Tensor], batch: int, **settings: Any) -> Any:
        """A collector that has seen all gradients."""
        from bergson.collector.in_memory_collector import InMemoryCollector
        from bergson.config import IndexConfig
        from datasets import Dataset

        seen = Dataset.from_dict({"length": [1] * len(data)})
        config = IndexConfig(run_path="unused", include_bias=True)
        collector = InMemoryCollector(model=self.model, cfg=config, data=seen, **settings)
        return self.read(collector, data, loss, batch)

    def by_projections(self, asked: list[Batch], batch: int) -> list[Tensor]:
        """Float[50 n] of each input, by its index."""
        from bergson.gradients import GradientProcessor
        from bergson.hessians.inversion import invert_psd_matrix

        settings = {"projection_dim": PROJECTION, "include_bias": True, "projection_seed": 0}
        processor = GradientProcessor(**settings)
        index = self.gradients(self.train, losses, batch, processor=processor, skip_hessians=False).gradients
        moments = processor.hessians
        inverse = {name: invert_psd_matrix(moments[name], "damped_inverse", DAMPING) for name in moments}
        found = []
        for one in asked:
            plain = GradientProcessor(**settings)
            queries = self.gradients(TensorDataset(*one), margins, batch, processor=plain).gradients
            parts = [(COMBINE @ queries[name] @ inverse[name]) @ index[name].T for name in index]
            found.append(torch.stack(parts).sum(0))
        return found

    def by_factors(self, asked: list[Batch], batch: int) -> list[Tensor]:
        """Float[50 n] of each input, by EK-FAC and a pass for each."""
        from bergson.config import InversionConfig
        from bergson.gradients import GradientProcessor
        from bergson.hessians.eigenvectors import LambdaCollector, eigendecompose_owned
        from bergson.hessians.kfac import CovarianceCollector
        from bergson.hessians.preconditioner import FactoredPreconditioner
        from bergson.score.score_writer import InMemorySequenceScoreWriter
        from bergson.score.scorer import Scorer

        whole = {"processor": GradientProcessor(include_bias=True)}
        with tempfile.TemporaryDirectory() as folder:
            common = {"model": self.model, "path": folder, "dtype": torch.float32, **whole}
            seen = self.read(CovarianceCollector(**common), self.train, sampled, batch)
            vectors = tuple(
                eigendecompose_owned(
                    covariances, shapes, None, 1, f"{folder}/{part}", torch.float32, seen.num_positions
                )[0]
                for covariances, shapes, part in (
                    (seen.A_cov_dict, seen.A_shapes, "eigen_activation_sharded"),
                    (seen.S_cov_dict, seen.S_shapes, "eigen_gradient_sharded"),
                )
            )
            corrected = LambdaCollector(**common, num_documents=len(self.train), eigenvectors=vectors)
            self.read(corrected, self.train, sampled, batch)
            inversion = InversionConfig("damped_inverse", DAMPING)
            inverse = FactoredPreconditioner.from_path(folder, inversion_cfg=inversion, ev_correction=True)
        found = []
        for one in asked:
            queries = inverse.apply(self.gradients(TensorDataset(*one), margins, batch, **whole).gradients)
            combined = {name: COMBINE @ values for name, values in queries.items()}
            written = InMemorySequenceScoreWriter(len(self.train), len(COMBINE))
            scorer = Scorer(combined, list(combined), written, torch.device("cpu"), torch.float32)
            self.gradients(self.train, losses, batch, scorer=scorer, **whole)
            found.append(written.scores.T)
        return found


def measure(bench: Bench) -> None:
    """Several suspects, one after the other, of one network."""
    images, generator = 500 if bench.options.quick else 5000, torch.Generator().manual_seed(0)
    training_set = random_images(images, generator)
    train = TensorDataset(*training_set.batch(0, images))
    asked = [random_images(51, generator).batch(0, 51) for _ in range(bench.options.suspects)]
    name = bench.options.network
    model = network(name)
    with tempfile.TemporaryDirectory() as folder:
        peer = Kronfluence(model, train, folder)
        peers: dict[str, Callable[..., list[Tensor]]] = {
            "kronfluence": partial(by_kronfluence, peer),
            "kronfluence, rank 32": partial(by_kronfluence, peer, rank=32),
        }
        if name == "mlp":
            peers["dattri"] = partial(by_dattri, model, train)
        if name != "resnet9":
            bergson = Bergson(as_tokens(model) if name == "mlp" else model, train)
            peers |= {"bergson, EK-FAC": bergson.by_factors, "bergson, projected": bergson.by_projections}
        sides: dict[str, Callable[[], list[Tensor]]] = {"unpoison": partial(ours, model, training_set, asked)}
        for side, work in peers.items():
            batch = fastest(bench.options.batches, partial(work, asked[:1]))
            sides[side] = partial(work, asked, batch)
            bench.work[f"batch of {side}"] = batch
        found = bench.compare(f"{len(asked)} suspects", sides, warm=True)
    own = torch.cat(found["unpoison"]).double().flatten()
    for side in peers:
        both = torch.stack([own, torch.cat(found[side]).double().flatten()])
        bench.agreement[f"correlation with {side}"] = float(both.corrcoef()[0, 1])
    bench.work |= {"network": name, "training images": images, "queries of a suspect": 51}


if __name__ == "__main__":
    main(measure, batches=[128, 512], suspects=10, network="tokens", store="suspects_tokens", threads=1)
