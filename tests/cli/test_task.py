"""`--task`: where the logits are in what a network of one's own returns."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import unpoison
from unpoison.cli import main
from unpoison.cli._inputs import task_of
from unpoison.data import TrainingSet, encode_png, write_npz
from unpoison.errors import InputError
from unpoison.tasks import ClassificationTask

TASK = ClassificationTask(output="shares", values="probabilities")
SHELL = ["--task", "output=shares", "values=probabilities"]
SOURCE = '''
import torch
from torch import nn

class Shares(nn.Module):
    """Returns two tensors by name, of which one holds probabilities."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(144, 8), nn.Linear(8, 3)

    def forward(self, images):
        hidden = self.body(images.flatten(1)).relu()
        return {"features": hidden, "shares": self.head(hidden).softmax(1)}

def network():
    return Shares()
'''


def make_set(count: int, name: str, seed: int) -> TrainingSet:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 60, (count, 1, 12, 12), generator=generator, dtype=torch.uint8)
    for label in range(3):
        images[labels == label, :, :, 4 * label : 4 * label + 4] += 120
    return TrainingSet(images, labels, ("left", "middle", "right"), name)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shares_of_tests.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_npz(tmp_path / "data.npz", make_set(60, "train", 0), make_set(30, "test", 1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = built()
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    images, labels = make_set(60, "train", 0).batch(0, 60)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.nll_loss(network(images)["shares"].log(), labels).backward()
        optimizer.step()
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "odd.png").write_bytes(encode_png(make_set(30, "test", 1).images[3]))
    yield tmp_path
    sys.modules.pop("shares_of_tests", None)


def built() -> nn.Module:
    import shares_of_tests

    network: nn.Module = shares_of_tests.network()
    return network


def trained(place: Path) -> nn.Module:
    network = built()
    network.load_state_dict(load_file(place / "weights.safetensors"))
    return network.eval()


def run(verb: str, out: str, *more: str) -> dict[str, Any]:
    words = [verb, "--model", "shares_of_tests:network", "--weights", "weights.safetensors"]
    assert main([*words, "--data", "data.npz", *more, "--out", out]) == 0
    record: dict[str, Any] = json.loads(Path(out, "run.json").read_text())
    return record


def training_set() -> TrainingSet:
    return unpoison.data.load("data.npz").train


def test_a_trace_a_scan_and_a_healing_are_those_of_python(place: Path) -> None:
    observation = unpoison.Observation(unpoison.data.load("data.npz").test.images[3])
    run("trace", "traced", *SHELL, "--suspect", "odd.png", "--method", "ek-fac")
    expected = unpoison.trace(trained(place), training_set(), observation, method="ek-fac", task=TASK)
    found = unpoison.detectors.Findings.load("traced/findings")
    torch.testing.assert_close(found.scores, expected.scores.to(found.scores))
    for name, more in (("some", ("--option", 'modules=["he*"]')), ("same", ("--modules", "he*"))):
        some = run("trace", name, *SHELL, "--suspect", "odd.png", "--method", "ek-fac", *more)
        assert some["results"]["untracked"] == ["body.weight", "body.bias"]
        assert some["results"]["tracked_share"] == pytest.approx(27 / (27 + 144 * 8 + 8))
    record = run("scan", "scanned", *SHELL, "--method", "spectral-signatures")
    assert record["configuration"]["task"] == SHELL[1:]
    found = replace(found, flagged=torch.tensor([4, 7, 8]))
    found.save("flagged/findings")
    healed = run("heal", "healed", *SHELL, "--findings", "flagged", "--method", "relabel")
    assert healed["results"]["tuning"]["optimizer"] in ("sgd", "adamw")
    assert healed["results"]["clean_accuracy_after"] > 0.5
    weights = load_file("healed/model/model.safetensors")
    assert set(weights) == set(trained(place).state_dict())
    same = unpoison.heal(trained(place), training_set(), found, method="relabel", task=TASK)
    for name, value in same.model.state_dict().items():
        torch.testing.assert_close(weights[name], value)


def test_calibrated_keeps_and_takes_the_calibration_of_such_a_network(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SHELL, "--suspect", "odd.png", "--calibration", "kept", "--option", "false_alarm_level=0.2"]
    first = run("trace", "one", *words)
    assert "is used again" not in capsys.readouterr().err
    second = run("trace", "two", *words)
    assert "is of this model and is used again" in capsys.readouterr().err
    assert first["results"]["flagged_indices"] == second["results"]["flagged_indices"]
    assert first["results"]["p_value"] == second["results"]["p_value"]


def test_without_it_the_network_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["scan", "--model", "shares_of_tests:network", "--data", "data.npz", "--out", "x"]
    assert main(words) == 2
    assert "nothing that is known to be logits" in capsys.readouterr().err
    assert main([*words, "--task", "output=other"]) == 2
    assert "no 'other'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["shares"], "expected KEY=VALUE"),
        (["inputs=x"], "--task inputs=: expected output=KEY or values=probabilities"),
        (["output=true"], "expected a key, an attribute or a place"),
        (["output=1.5"], "expected a key, an attribute or a place"),
        (["values=odds"], "--task: values: expected 'logits' or 'probabilities', found 'odds'"),
    ],
)
def test_nonsense_is_refused(words: list[str], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        task_of(words)


def test_it_is_a_classification_task() -> None:
    assert task_of([]) is None
    assert task_of(["output=2"]) == ClassificationTask(output=2)
    assert task_of(["values=logits"]) == ClassificationTask(values="logits")
    assert task_of(["output=prediction", "values=probabilities"]) == ClassificationTask(
        output="prediction", values="probabilities"
    )
