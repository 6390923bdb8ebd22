"""Six methods beside the Adversarial Robustness Toolbox (ART), as a user calls either.

    python -m benchmarks.art [--json] [--poisons 20] [--steps 50]

The functions of `benchmarks/_art_snippets.py`: the same network, bytes and settings. "Lines" are their
statements, a line each, without imports.

- attacks: the same bases, steps and eps. Agreement is what is optimised, before and after, ours from 8-bit
  images. Bullseye Polytope: distance of the mean feature from the target's, in its norm; gradient matching,
  Sleeper Agent (no retraining; half of a class, chosen by gradient norm): 1 - cosine of the gradients; hidden
  trigger: mean squared distance from the features of patched sources, each used once, where ART's matching,
  which strikes out single pairs, may use one several times;
- detectors, which `benchmarks.detectors` times without the forward pass: the share of a class, a third of
  which is white in part, on which both flag the same. ART reads the logits, so ours is told to.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._harness import Bench, main, random_images
from benchmarks._tables import Record, general, table
from unpoison.attacks.hidden_trigger import nearest_partners
from unpoison.data import TrainingSet

ATTACKS = {
    "Bullseye Polytope": "bullseye",
    "gradient matching": "matching",
    "Sleeper Agent": "sleeper",
    "hidden trigger": "hidden",
}
DETECTORS = {"activation clustering": "clustering", "spectral signatures": "spectral"}


def tables(record: Record) -> Iterator[str]:
    """Times and agreement, and what a user writes."""
    yield from general(record)
    counted = record["work"]["lines"].items()
    yield table(("method", "lines here", "with ART"), [[one, *map(str, both)] for one, both in counted])


def lines_of(snippet: Callable[..., Any]) -> int:
    """The statements of a function, a line each."""
    (function,) = ast.parse(inspect.getsource(snippet)).body
    assert isinstance(function, ast.FunctionDef)
    return sum(len(ast.unparse(one).splitlines()) for one in function.body)


def measure(bench: Bench) -> None:
    """All six, each by both sides."""
    from benchmarks import _art_snippets as snippets

    poisons, steps = bench.options.poisons, 5 if bench.options.quick else bench.options.steps
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(16, 32, 3))
    last = (nn.ReLU(), nn.AvgPool2d(5), nn.Flatten(), nn.Linear(128, 10), nn.Identity())
    network = nn.Sequential(*body, *last).eval()

    def scene(count: int, white: int) -> Any:
        drawn = random_images(10 * count + 1, torch.Generator().manual_seed(0))
        labels, images = torch.arange(10 * count) % 10, drawn.images[:-1].clone()
        images[labels.eq(snippets.TARGET).nonzero()[:white, 0], :, :12, :12] = 255
        examples = TrainingSet(images, labels, drawn.class_names)
        return snippets.Scene(network, examples, drawn.images[-1:], count, steps)

    def gradient(made: Tensor) -> Tensor:
        loss = -network(made.float() / 255).log_softmax(1)[:, snippets.TARGET].mean()
        return torch.cat([one.flatten() for one in torch.autograd.grad(loss, list(network.parameters()))])

    def misaligned(wanted: Tensor, made: Tensor) -> float:
        return 1 - float(torch.cosine_similarity(gradient(made), gradient(wanted), dim=0))

    def features(made: Tensor) -> Tensor:
        return network[:-2](made.float() / 255).detach()

    def off_centre(made: Tensor) -> float:
        wanted = features(s.target).mean(0)
        return float((features(made).mean(0) - wanted).norm() / wanted.norm())

    def apart(made: Tensor) -> float:
        own, theirs = features(made), features(patched)
        return float((own - theirs[nearest_partners([own], [theirs])]).square().sum(1).mean())

    def pair(name: str, given: Any) -> dict[str, Callable[[], Any]]:
        both = [getattr(snippets, f"{name}_{side}") for side in ("here", "art")]
        lines.append([lines_of(one) for one in both])
        return dict(zip(("unpoison", "ART"), (partial(one, given) for one in both), strict=True))

    s, lines = scene(poisons, 0), []
    patched = snippets.CORNER.stamp(s.examples.images[s.examples.labels == snippets.SOURCE])
    left = (off_centre, partial(misaligned, s.target), partial(misaligned, patched), apart)
    for (what, name), value in zip(ATTACKS.items(), left, strict=True):
        with contextlib.redirect_stdout(io.StringIO()):
            found = bench.compare(what, pair(name, s))
        mine, theirs = found["unpoison"], found["ART"]
        if name == "sleeper":
            theirs, chosen = theirs
            same = torch.isin(torch.from_numpy(chosen), mine.indices).double().mean()
            bench.agreement[f"{what}, same choice"] = float(same)
        made = (s.examples.images[mine.indices], mine.images, torch.from_numpy(theirs) * 255)
        told = zip(("before", "unpoison", "ART"), made, strict=True)
        bench.agreement |= {f"{what}, {side}": value(one) for side, one in told}
    large = scene(200, 60)
    own = large.examples.labels == snippets.TARGET
    for what, name in DETECTORS.items():
        sides = pair(name, large)
        mine, theirs = torch.zeros(len(own), dtype=torch.bool), torch.from_numpy(sides["ART"]())
        mine[sides["unpoison"]()] = True
        bench.agreement[f"{what}, same flags"] = float((mine == theirs)[own].double().mean())
    counted = dict(zip((*ATTACKS, *DETECTORS), lines, strict=True))
    bench.work = {"poisons": poisons, "steps": steps, "lines": counted}


if __name__ == "__main__":
    main(measure, threads=1, poisons=20, steps=50)
