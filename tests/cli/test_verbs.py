"""The verbs on tiny data, one story: each writes what it promises, and says what it did not like."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from unpoison import attacks, data
from unpoison.cli import main
from unpoison.detectors import Findings
from unpoison.runs import run_schema
from unpoison.threats import Backdoor, Budget, PatchTrigger, PoisonSet
from unpoison.training import Trained

Fails = Callable[..., str]


def check(record: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(run_schema()).validate(record)


@pytest.fixture
def found(story: Any, corner_detector: None, tmp_path: Path) -> Path:
    """A run directory of trace."""
    assert main(story.trace(tmp_path / "found")) == 0
    return tmp_path / "found"


def test_craft_writes_a_poison_set(story: Any) -> None:
    record = story.read(story.place("poison"))
    check(record)
    poison = PoisonSet.load(Path(story.place("poison")) / record["artefacts"]["poison"])
    assert len(poison) == record["results"]["poisons"] == 30
    assert record["results"]["source"] == "left"
    assert record["results"]["target"] == "right"


@pytest.mark.parametrize(
    ("more", "poisons"), [(("--budget", ".05"), 15), (("--seed", "1"), 3), (("--budget-count", "7"), 7)]
)
def test_a_budget_is_a_share_of_the_whole_set(
    more: tuple[str, ...], poisons: int, story: Any, tmp_path: Path
) -> None:
    assert main(story.craft(tmp_path / "out", *more)) == 0
    assert story.read(tmp_path / "out")["results"]["poisons"] == poisons


def test_a_trigger_may_be_a_picture(story: Any, tmp_path: Path) -> None:
    Image.new("L", (5, 2), 255).save(tmp_path / "bar.png")
    assert (
        main(story.craft(tmp_path / "out", "--budget-count", "4", "--trigger", str(tmp_path / "bar.png")))
        == 0
    )
    poison = PoisonSet.load(tmp_path / "out" / "poison")
    assert bool((poison.images[:, :, -2:, -5:] == 255).all())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--budget", ".1", "--budget-count", "3"), "give one of the two"),
        (("--budget", "2"), "share 2.0 is outside (0, 1]"),
        (("--budget-count", "999"), "999 is more than the 300 examples"),
        (("--trigger", "nosuch.png"), "--trigger nosuch.png"),
        (("--option", "least_visible=abc"), "least_visible must be a number in [0, 1], found 'abc'"),
        (("--source", "up"), "--source up: no such class; give a name (left, middle, right)"),
        (("--target", "9"), "--target 9"),
        (("--target", "left"), "same class"),
        (("--data", "nosuch.npz"), "nosuch.npz"),
    ],
)
def test_craft_refuses(more: tuple[str, ...], said: str, story: Any, fails: Fails, tmp_path: Path) -> None:
    assert said in fails(story.craft(tmp_path / "out", *more))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_attack_is_named(story: Any, fails: Fails, tmp_path: Path) -> None:
    said = fails(["craft", "nosuch", *story.craft(tmp_path / "out")[2:]])
    assert said.startswith("there is no attack 'nosuch'; there are adaptive-blend, ")


def test_labels_are_flipped_from_source_to_target(story: Any, fails: Fails, tmp_path: Path) -> None:
    arguments = ["craft", "label-flip", *story.craft(tmp_path / "out")[2:]]
    at = arguments.index("--source")
    said = fails([*arguments[:at], *arguments[at + 2 :]])
    assert said == "--source: the goal 'label-noise' needs it"
    assert main(arguments) == 0


@pytest.mark.parametrize(
    ("attack", "more", "said"),
    [
        (
            "label-flip",
            ("--trigger", "four-pixels"),
            "--trigger: label-flip takes no trigger; it is no backdoor",
        ),
        ("sig", ("--trigger", "white-corner"), "--trigger: sig takes no trigger; it makes its own"),
        (
            "badnets",
            ("--recipe", "fast"),
            "--recipe: badnets does not use it; it says how surrogates",
        ),
        ("wanet", ("--model", "resnet9"), "--model: wanet does not use it; it says how surrogates"),
        ("metapoison", ("--batch-size", "8"), "--batch-size: metapoison does not use it; it says"),
    ],
)
def test_options_that_an_attack_does_not_use_are_refused(
    attack: str, more: tuple[str, ...], said: str, story: Any, fails: Fails, tmp_path: Path
) -> None:
    assert fails(["craft", attack, *story.craft(tmp_path / "out", *more)[2:]]).startswith(said)
    assert list(tmp_path.iterdir()) == []


def test_attacks_that_make_their_own_trigger_are_known_as_such(story: Any) -> None:
    training_set = data.load(story.data).train
    model = Trained.load(Path(story.place("clean")) / "model").model
    goal = Backdoor(PatchTrigger.white_corner(), 0, 2)
    quick: dict[str, dict[str, Any]] = {
        "combat": {"epochs": 1, "width": 2},
        "hidden-trigger": {"steps": 1},
        "input-aware": {"mask_epochs": 1, "epochs": 1, "width": 2},
        "label-consistent": {"steps": 1},
        "narcissus": {"steps": 1},
        "sig": {"frequency": 5.0},
        "sleeper-agent": {"steps": 1, "retrainings": 0},
        "smooth-trigger": {"images": 2, "rounds": 1, "steps": 1},
        "wanet": {"cover_ratio": 1.0},
    }
    found = []
    for name in attacks.names():
        if "backdoor" in attacks.describe(name).goals:
            attack = attacks.get(name, **quick.get(name, {}))
            poison = attack.craft(goal, training_set, budget=Budget(count=4), surrogate=model, seed=0)
            assert isinstance(poison.goal, Backdoor)
            if poison.goal.trigger is not goal.trigger:
                found.append(name)
    assert found == [name for name in attacks.names() if attacks.describe(name).makes_trigger]
    assert {"blended", "sig", "smooth-trigger", "wanet"} <= set(found)


def test_train_writes_a_model_and_measures_it(story: Any) -> None:
    record = story.read(story.place("model"))
    check(record)
    trained = Trained.load(Path(story.place("model")) / record["artefacts"]["model"])
    assert trained.recipe.width == 4
    assert record["results"]["poisons"] == 30
    assert record["results"]["measured"]["clean_accuracy"]["trials"] == 60
    assert record["results"]["attack_success"] is not None
    clean = story.read(story.place("clean"))
    check(clean)
    assert clean["results"]["attack_success"] is None
    assert clean["results"]["fingerprint"] != record["results"]["fingerprint"]


def test_json_is_all_there_is_on_standard_output(
    story: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(story.train(tmp_path / "out", "--json")) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == story.read(tmp_path / "out")
    assert said.err.startswith("training ")


def test_a_run_repeats_by_its_seed(story: Any, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(story.train(tmp_path / name, "--seed", seed)) == 0
        weights.append((tmp_path / name / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_a_stopped_training_goes_on_from_its_checkpoints(
    story: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main(story.train(whole)) == 0
    command = story.train(resumed, "--checkpoints", str(tmp_path / "checkpoints"))

    with monkeypatch.context() as patch:
        patch.setattr("unpoison.cli._console.Console.progress", _stop_after_one_epoch)
        assert main(command) == 130
    assert not resumed.exists()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["epoch-0001"]
    assert main(command) == 0
    file = Path("model") / "model.safetensors"
    assert (resumed / file).read_bytes() == (whole / file).read_bytes()


class _stop_after_one_epoch:
    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> Callable[..., None]:
        def progress(stage: str, done: int, total: int, /, **metrics: float) -> None:
            raise KeyboardInterrupt

        return progress

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--recipe", "nosuch"), "there is no preset 'nosuch'"),
        (("--model", "nosuch"), "nosuch"),
        (("--epochs", "0"), "epochs must be a whole number in [1, 100000], found 0"),
        (("--threads", "0"), "--threads 0: must be at least 1"),
        (("--poison", "nosuch"), "--poison nosuch: no such directory"),
        (("--poison", "."), "--poison .: holds neither poison/poison.json nor poison.json"),
        (("--learning-rate", "1e5"), "training diverged"),
    ],
)
def test_train_refuses(more: tuple[str, ...], said: str, story: Any, fails: Fails, tmp_path: Path) -> None:
    assert said in fails(story.train(tmp_path / "out", *more))
    assert list(tmp_path.iterdir()) == []


def test_cuda_that_is_not_there_is_said(
    story: Any, fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda: PyTorch sees no CUDA device" in fails(
        story.train(tmp_path / "out", "--device", "cuda")
    )


def test_poison_of_another_set_is_refused(story: Any, fails: Fails, tmp_path: Path) -> None:
    said = fails(["train", "--data", "sample", "--poison", story.place("poison"), "--out", tmp_path / "out"])
    assert "the poison was crafted for" in said


def test_out_is_kept_unless_told_otherwise(story: Any, fails: Fails, tmp_path: Path) -> None:
    assert main(story.craft(tmp_path / "out")) == 0
    before = (tmp_path / "out" / "run.json").read_bytes()
    assert "give --overwrite" in fails(story.craft(tmp_path / "out"))
    assert (tmp_path / "out" / "run.json").read_bytes() == before
    assert main(story.craft(tmp_path / "out", "--overwrite", "--budget-count", "5")) == 0
    assert story.read(tmp_path / "out")["results"]["poisons"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_trace_writes_findings(story: Any, found: Path) -> None:
    record = story.read(found)
    check(record)
    results = record["results"]
    findings = Findings.load(found / record["artefacts"]["findings"])
    truth = PoisonSet.load(Path(story.place("poison")) / "poison").indices.tolist()
    assert results["flagged_indices"] == findings.flagged.tolist() == truth
    assert results["precision"] == results["recall"] == results["average_precision"] == 1
    assert (results["predicted"], results["true"]) == ("right", "left")
    blamed = load_file(found / record["artefacts"]["blamed"])
    assert blamed["images"].shape == (64, 1, 12, 12)
    assert blamed["indices"][:30].tolist() == truth
    assert len(blamed["indices"].unique()) == 64
    splits = data.load(story.data)
    poisoned = PoisonSet.load(Path(story.place("poison")) / "poison").apply(splits.train)
    assert torch.equal(blamed["images"], poisoned.images[blamed["indices"]])


def test_fail_on_findings(story: Any, corner_detector: None, tmp_path: Path) -> None:
    assert main(story.trace(tmp_path / "found", "--fail-on-findings")) == 1
    assert (tmp_path / "found" / "run.json").is_file()


def test_an_honest_mistake_fails_nothing(story: Any, corner_detector: None, tmp_path: Path) -> None:
    splits = data.load(story.data)
    picture = splits.test.images[0].clone()
    picture[:, -3:, -3:] = 255
    Image.fromarray(picture[0].numpy()).save(tmp_path / "suspect.png")
    arguments = [
        *("trace", "--model", story.place("clean"), "--data", story.data, "--out", str(tmp_path / "found")),
        *("--suspect", str(tmp_path / "suspect.png"), "--method", "corner", "--fail-on-findings"),
    ]
    assert main(arguments) == 0
    record = story.read(tmp_path / "found")
    check(record)
    assert record["results"]["poison_found"] is False
    assert record["results"]["recall"] is record["results"]["true"] is None


@pytest.mark.usefixtures("corner_detector")
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--suspect", "test:60"), "expected test:INDEX with an index 0..59"),
        (("--suspect", "triggered:x"), "expected triggered:INDEX"),
        (("--suspect", "nosuch.png"), "nosuch.png"),
        (("--suspect", "test:1"), "--suspect test:1: "),
        (("--suspect", "test:1"), "there is nothing to trace"),
        (("--predicted", "middle"), "(right)"),
        (("--true", "right"), "there is nothing to trace"),
        (
            ("--model", "nosuch"),
            "--model nosuch: neither a directory that is there nor timm:NAME",
        ),
    ],
)
def test_trace_refuses(more: tuple[str, ...], said: str, story: Any, fails: Fails, tmp_path: Path) -> None:
    assert said in fails(story.trace(tmp_path / "out", *more))
    assert list(tmp_path.iterdir()) == []


def test_trace_knows_its_presets(story: Any, fails: Fails, tmp_path: Path) -> None:
    said = fails(story.trace(tmp_path / "out", "--method", "calibrated", "--preset", "nosuch"))
    assert said == "calibrated: there is no preset 'nosuch'; there are default"
    said = fails(story.trace(tmp_path / "out", "--method", "ek-fac", "--preset", "calibrated"))
    assert said == "ek-fac: there is no preset 'calibrated'; there are default, published"
    level = ("--method", "delta-influence", "--option", "false_alarm_level=0.1")
    assert "there is no option 'false_alarm_level'" in fails(story.trace(tmp_path / "out", *level))
    level = ("--method", "calibrated", "--option", "false_alarm_level=high")
    assert "calibrated: " in fails(story.trace(tmp_path / "out", *level))


@pytest.mark.parametrize(
    "more",
    [
        ("--method", "calibrated", "--option", "false_alarm_level=0.1"),
        ("--method", "delta-influence"),
        ("--method", "ek-fac"),
        ("--method", "ek-fac", "--preset", "published"),
        ("--method", "calibrated", "--reference", "tiny.npz", "--option", "false_alarm_level=0.1"),
    ],
)
def test_every_method_traces(
    more: tuple[str, ...], story: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(story.folder)
    assert main(story.trace(tmp_path / "out", *more)) == 0
    record = story.read(tmp_path / "out")
    check(record)
    assert record["results"]["average_precision"] > 0.2


@pytest.mark.usefixtures("corner_detector")
def test_a_triggered_image_needs_the_trigger(story: Any, fails: Fails, tmp_path: Path) -> None:
    said = fails(
        [
            *("trace", "--model", story.place("clean"), "--data", story.data),
            *("--suspect", "triggered:0", "--method", "corner", "--out", tmp_path / "out"),
        ]
    )
    assert "give --poison" in said


@pytest.mark.usefixtures("corner_detector")
def test_a_suspect_of_another_size_is_refused(story: Any, fails: Fails, tmp_path: Path) -> None:
    Image.new("L", (5, 7)).save(tmp_path / "suspect.png")
    said = fails(story.trace(tmp_path / "out", "--suspect", str(tmp_path / "suspect.png")))
    assert "is 5 pixels wide and 7 high" in said


@pytest.mark.parametrize("method", ["retrain", "fine-tune"])
def test_heal_forgets_and_measures(method: str, story: Any, found: Path, tmp_path: Path) -> None:
    assert main(story.heal(tmp_path / "healed", found, "--method", method)) == 0
    record = story.read(tmp_path / "healed")
    check(record)
    assert record["results"]["removed"] == 30
    before = story.read(story.place("model"))["results"]
    assert record["results"]["attack_success_before"] == before["attack_success"]
    assert record["results"]["clean_accuracy_before"] == before["clean_accuracy"]
    Trained.load(tmp_path / "healed" / record["artefacts"]["model"])


def test_heal_refuses_findings_of_another_set(story: Any, found: Path, fails: Fails, tmp_path: Path) -> None:
    said = fails(
        [
            *("heal", "--model", story.place("model"), "--data", story.data, "--findings", found),
            *("--out", tmp_path / "healed"),
        ]
    )
    assert "of another training set" in said
    assert "nosuch: no such directory" in fails(story.heal(tmp_path / "healed", "nosuch"))


def test_heal_repairs_by_clean_examples_without_findings(story: Any, fails: Fails, tmp_path: Path) -> None:
    clean = data.load(story.data).test
    assert clean is not None
    data.write_npz(tmp_path / "clean.npz", clean, clean)
    base = ["heal", "--model", story.place("model"), "--data", story.data, "--poison", story.place("poison")]
    by_nad = [*base, "--method", "nad", "--out", str(tmp_path / "healed")]
    reference = ("--reference", str(tmp_path / "clean.npz"))
    assert fails(by_nad).startswith("--reference: nad needs clean examples; give some, or --findings")
    assert fails([*base, "--out", str(tmp_path / "healed")]).startswith(
        "--findings: retrain needs the examples to forget"
    )
    assert fails([*by_nad, "--method", "relabel", "--findings", "any", *reference]).startswith(
        "--reference: relabel does not use one; leave it out, or heal by fine-pruning, i-bau, nad"
    )
    assert main([*by_nad, "--option", "epochs=1", *reference]) == 0
    record = story.read(tmp_path / "healed")
    check(record)
    assert record["results"]["removed"] == 0
    before = story.read(story.place("model"))["results"]
    assert record["results"]["attack_success_before"] == before["attack_success"]
    own, healed = (
        Trained.load(place / "model").model.state_dict()
        for place in (Path(story.place("model")), tmp_path / "healed")
    )
    assert own.keys() == healed.keys()
    assert any(not torch.equal(own[name], healed[name]) for name in own)


def test_report_is_one_page(story: Any, found: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    runs = [str(found), story.place("poison"), story.place("model")]
    assert main(["report", *runs, "--out", str(page)]) == 0
    assert page.read_text().startswith("<!doctype html>") or "<html" in page.read_text()
    assert main(["report", *runs, "--out", str(tmp_path / "report")]) == 0
    record = story.read(tmp_path / "report")
    check(record)
    assert (tmp_path / "report" / record["artefacts"]["report"]).read_bytes() == page.read_bytes()


def test_report_refuses_what_is_no_run(fails: Fails, tmp_path: Path) -> None:
    assert "no such" in fails(["report", tmp_path / "nosuch", "--out", tmp_path / "page.html"])
    assert list(tmp_path.iterdir()) == []


FACTORY = """
from torch import nn
def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 3))
def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 2))
def broken():
    raise RuntimeError("no such luck")
def text():
    return "net"
constant = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with somebody's own networks, which is the current directory."""
    (tmp_path / "mynet.py").write_text(FACTORY)
    (tmp_path / "unwell.py").write_text("import nosuchdependency")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("mynet", None)


def own_weights(path: Path) -> None:
    """A network that takes everything for `right`."""
    save_file({"1.weight": torch.zeros(3, 144), "1.bias": torch.tensor([0.0, 0.0, 9.0])}, path)


TRAINER = """
import csv, os, sys, torch
from safetensors.torch import save_file
kept = list(csv.DictReader(open(sys.argv[-2])))
assert os.environ["UNPOISON_SEED"] == "0" and len({row["index"] for row in kept}) == len(kept)
bias = torch.full((3,), float(len(kept)))
save_file({"model.1.weight": torch.zeros(3, 144), "model.1.bias": bias}, sys.argv[-1])
"""


def test_healing_by_a_command_of_ones_own(story: Any, own: Path, corner_detector: None, fails: Fails) -> None:
    own_weights(own / "weights.safetensors")
    (own / "trainer.py").write_text(TRAINER)
    mine = ("--model", "mynet:make", "--weights", "weights.safetensors", "--normalization", ".4;.2")
    assert main(story.trace("found", *mine)) == 0
    command = f"{sys.executable} trainer.py"
    assert main(story.heal("healed", "found", *mine, "--train-command", command)) == 0
    record = story.read("healed")
    check(record)
    results = record["results"]
    assert results["method"] == "--train-command"
    weights = load_file(own / "healed" / "model" / "model.safetensors")
    assert weights["network.1.bias"].tolist() == [float(results["examples"] - results["removed"])] * 3
    for broken, words in (
        ("nosuchprogram", "nosuchprogram: cannot be started"),
        (f"{sys.executable} -c pass", "wrote no weights"),
        ("", "is empty"),
        ("python 'train.py", "cannot be split into words (No closing quotation)"),
    ):
        assert words in fails(story.heal("again", "found", *mine, "--train-command", broken))
    for unused in (("--epochs", "3"), ("--no-flip",), ("--method", "ssd")):
        words = f"{unused[0]}: is not used with --train-command"
        assert words in fails(story.heal("again", "found", *mine, "--train-command", command, *unused))
    of_ours = ("--train-command", command)
    assert "--model must be" in fails(story.heal("again", "found", *of_ours))


def test_a_network_of_ones_own(story: Any, own: Path, corner_detector: None) -> None:
    own_weights(own / "weights.safetensors")
    mine = ("--model", "mynet:make", "--weights", "weights.safetensors", "--normalization", ".4;.2")
    assert main(story.trace("found", *mine)) == 0
    assert main(story.heal("healed", "found", *mine, "--epochs", "1")) == 0
    healed = (
        "--model",
        "mynet:make",
        "--weights",
        "healed/model/model.safetensors",
        "--normalization",
        ".4;.2",
    )
    check(story.read("healed"))
    assert main(story.heal("again", "found", *healed, "--epochs", "1")) == 0
    after, before = story.read("healed")["results"], story.read("again")["results"]
    assert after["clean_accuracy_after"] == before["clean_accuracy_before"]


@pytest.mark.usefixtures("corner_detector")
@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nosuch:make", "there is no module 'nosuch' in the current directory or installed"),
        ("unwell:make", "importing unwell failed: No module named 'nosuchdependency'"),
        ("mynet:nosuch", "module mynet has no 'nosuch'"),
        ("mynet:constant", "constant is int, not a function"),
        ("mynet:text", "the factory returned str, not a torch.nn.Module"),
        ("mynet:broken", "the factory failed (RuntimeError: no such luck)"),
        ("mynet:narrow", "returns 2 logits for an input, but"),
    ],
)
def test_a_network_that_cannot_be_had(model: str, said: str, story: Any, own: Path, fails: Fails) -> None:
    assert said in fails(story.trace("out", "--model", model))


@pytest.mark.usefixtures("corner_detector")
@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"1.weight": torch.zeros(3, 144)}, "lacks '1.bias'"),
        ({"1.weight": torch.zeros(3, 9), "1.bias": torch.zeros(3)}, "'1.weight' has shape (3, 9)"),
        (
            {"1.weight": torch.zeros(3, 144), "1.bias": torch.zeros(3), "2.bias": torch.zeros(3)},
            "holds '2.bias', which the model does not have",
        ),
    ],
)
def test_weights_that_do_not_fit(
    weights: dict[str, torch.Tensor], said: str, story: Any, own: Path, fails: Fails
) -> None:
    save_file(weights, own / "weights.safetensors")
    assert said in fails(story.trace("out", "--model", "mynet:make", "--weights", "weights.safetensors"))
    (own / "weights.safetensors").write_bytes(b"pickle")
    said = fails(story.trace("out", "--model", "mynet:make", "--weights", "weights.safetensors"))
    assert "cannot be read as safetensors" in said
    assert "no such file" in fails(story.trace("out", "--model", "mynet:make", "--weights", "gone"))


@pytest.mark.usefixtures("corner_detector")
@pytest.mark.parametrize("text", [".5", "a;b", ".5,.5;.2", ".5;0"])
def test_a_normalization_that_cannot_be(text: str, story: Any, own: Path, fails: Fails) -> None:
    assert "normalization" in fails(story.trace("out", "--model", "mynet:make", "--normalization", text))


def test_a_rate_is_never_nan(story: Any) -> None:
    def numbers(value: Any) -> Any:
        if isinstance(value, dict):
            for entry in value.values():
                yield from numbers(entry)
        elif isinstance(value, float):
            yield value

    assert all(math.isfinite(number) for number in numbers(story.read(story.place("model"))))
    assert isinstance(nn.Module, type)
