"""Recipes: what is read, and that each mistake is named with the nearest thing that would be right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unpoison.errors import InputError
from unpoison.evaluation import Experiment

RECIPES = Path(__file__).parents[2] / "recipes"


def values(**changes: Any) -> dict[str, Any]:
    return {
        "name": "one",
        "seeds": [0, 1],
        "data": {"source": "sample"},
        "attacks": [{"name": "badnets", "budget": [0.01, 0.02]}],
        "targets": {"pairs": [["Sandal", "Bag"], [0, 1]]},
        "training": {"preset": "sample", "epochs": 2},
        "detectors": [{"name": "delta-influence"}, {"name": "ek-fac", "preset": "published"}],
        "unlearners": [{"name": "fine-tune", "options": {"layers": 1}}],
        **changes,
    }


def test_a_recipe_holds_what_it_says() -> None:
    experiment = Experiment.from_dict(values())
    assert experiment.attacks[0].budget == (0.01, 0.02)
    assert experiment.targets.pairs == (("Sandal", "Bag"), (0, 1))
    assert experiment.recipe().epochs == 2
    assert [one.label for one in experiment.detectors] == [
        "delta-influence",
        "ek-fac (published)",
    ]
    assert experiment.unlearners[0].label == "fine-tune (layers 1)"
    assert experiment.threads == 1
    json.dumps(experiment.to_dict(), allow_nan=False)


def test_attacks_of_one_name_are_told_apart() -> None:
    one = {"name": "gradient-matching", "budget": 0.1, "options": {"steps": 5, "augmentation": "crop"}}
    other = {**one, "options": {"steps": 5, "eps": 8}, "surrogates": 2}
    attacks = [{"name": "badnets", "budget": 0.1}, one, other]
    experiment = Experiment.from_dict({**values(), "attacks": attacks})
    assert [experiment.attack_label(choice) for choice in experiment.attacks] == [
        "badnets",
        "gradient-matching (augmentation crop)",
        "gradient-matching (eps 8, surrogates 2)",
    ]


def test_a_surrogate_s_training_does_not_hide_an_attack_s_option() -> None:
    attacks = [
        {
            "name": "hidden-trigger",
            "budget": 0.1,
            "options": {"batch_size": size},
            "surrogate": {"batch_size": 64},
        }
        for size in (16, 32)
    ]
    experiment = Experiment.from_dict({**values(), "attacks": attacks})
    assert [experiment.attack_label(choice) for choice in experiment.attacks] == [
        "hidden-trigger (batch_size 16)",
        "hidden-trigger (batch_size 32)",
    ]


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.toml")), ids=lambda path: path.name)
def test_the_recipes_of_the_project_can_be_read(path: Path) -> None:
    experiment = Experiment.read(path)
    assert experiment.name == path.stem
    stored = json.loads(json.dumps(experiment.to_dict()))
    assert Experiment.from_dict(stored).to_dict() == experiment.to_dict()


def test_reading_imports_no_torch() -> None:
    code = (
        "import sys; from unpoison.evaluation import Experiment\n"
        f"Experiment.read({str(RECIPES / 'smoke.toml')!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sedes": [1]}, "recipe: unknown key 'sedes'; did you mean 'seeds'?"),
        ({"folder": 1}, "recipe: folder: must be text, found 1"),
        ({"data": {"sourse": "sample"}}, "recipe: data: unknown key 'sourse'; did you mean 'source'?"),
        ({"data": {}}, "recipe: data: the key 'source' is missing"),
        (
            {"attacks": [{"name": "badnet", "budget": 0.1}]},
            "recipe: attacks[0]: there is no attack 'badnet'; did you mean 'badnets'?",
        ),
        (
            {"attacks": [{"name": "badnets", "budget": 1.5}]},
            "recipe: attacks[0]: budget: 1.5 is outside 1e-09..1; the nearest allowed is 1",
        ),
        ({"attacks": [{"name": "badnets"}]}, "give either 'budget'"),
        ({"attacks": [{"name": "badnets", "bugdet": 0.1}]}, "'bugdet'; did you mean 'budget'?"),
        ({"attacks": []}, "attacks and targets: give both, or neither"),
        ({"attacks": [], "targets": None}, "give answers = 'errors' or 'right'"),
        ({"detectors": [{"name": "ek-fac", "answers": "erors"}]}, "did you mean 'errors'?"),
        ({"detectors": [{"name": "ek-fac", "inputs": 0}]}, "inputs: 0 is outside 1.."),
        ({"detectors": [{"name": "ek-fac", "parts": ["detectd"]}]}, "did you mean 'detected'?"),
        (
            {"detectors": [{"name": "deep-knn", "observations": 2}]},
            "deep-knn scans the training set; leave out answers, observations and inputs",
        ),
        ({"victims": []}, "victims: needs at least one"),
        ({"victims": [{"name": "a"}, {"name": "a"}]}, "victims: 'a' stands there twice"),
        ({"victims": [{"name": "a", "training": {"epoch": 3}}]}, "did you mean 'epochs'?"),
        ({"probe": ["logit"]}, "probe: there is no 'logit'; did you mean 'logits'?"),
        ({"attacks": [{"name": "badnets", "budget": 0.1, "goal": "targeted-misclassification"}]}, "goal: "),
        ({"attacks": [{"name": "badnets", "budget": 0.1, "known": 1.0}]}, "known: 1 is outside 0..0.999"),
        ({"pretraining": {"training": {"width": 8}}}, "the architecture is that of the victims"),
        ({"targets": {"pairs": [["Bag", "Coat"]], "networks": 2}}, "networks: choose test images; give 'c"),
        ({"targets": {"pairs": ["Sandal", "Bag"]}}, "targets: pairs[0]: must be a list of 2, found 'Sandal'"),
        ({"targets": {"pairs": [["Bag", "Bag"]]}}, "source and target are the same class 'Bag'"),
        ({"targets": {}}, "give either 'pairs' of classes, test 'images' or a file of published 'setups'"),
        ({"training": {"preset": "sampel"}}, "there is no preset 'sampel'"),
        ({"training": {"preset": "sample", "epoch": 3}}, "unknown field 'epoch'; did you mean 'epochs'?"),
        ({"training": {"epochs": 0}}, "epochs must be a whole number in [1, 100000], found 0"),
        ({"detectors": [{"name": "ek-fac", "preset": "pub"}]}, "preset: there is no 'pub'"),
        ({"detectors": [{"name": "ek-fac"}, {"name": "ek-fac"}]}, "detectors: 'ek-fac' stands there twice"),
        ({"detectors": []}, "so the recipe needs one of those"),
        (
            {"unlearners": [{"name": "retrian"}]},
            "unlearners[0]: there is no unlearner 'retrian'; did you mean 'retrain'?",
        ),
        ({"defenses": [{"name": "epix"}]}, "defenses[0]: there is no defense 'epix'; did you mean 'epic'?"),
        ({"defenses": [{"name": "epic", "preset": "strong"}]}, "defenses[0]: preset: there is no 'strong'"),
        ({"defenses": [{"name": "epic"}, {"name": "epic"}]}, "defenses: 'epic' stands there twice"),
        ({"defenses": [{"name": "epic", "like": "epic"}]}, "it is for loss-drop, random-drop"),
        (
            {"defenses": [{"name": "epic"}, {"name": "loss-drop", "like": "epik"}]},
            "like = 'epik' must name one other defense; did you mean 'epic'?",
        ),
        (
            {"defenses": [{"name": "mixup"}, {"name": "random-drop", "like": "mixup"}]},
            "recipe: defenses: like = 'mixup': mixup drops nothing in rounds; only epic, ",
        ),
        (
            {"attacks": [{"name": "badnets", "budget": 0.1, "surrogates": 2}]},
            "badnets crafts without a network; leave out 'surrogates'",
        ),
        (
            {"attacks": [{"name": "smooth-trigger", "budget": 0.1, "trigger": "four-pixels"}]},
            "smooth-trigger takes no trigger; leave out 'trigger'",
        ),
        (
            {"targets": {"pairs": [["Bag", "Coat"]], "images": [{"test_index": 3, "target": "Bag"}]}},
            "give either 'pairs' of classes, test 'images' or",
        ),
        ({"targets": {"setups": "x.json", "correct": 1}}, "correct: chooses test images of 'pairs'"),
        ({"targets": {"pairs": [["Bag", "Coat"]], "correct": 0}}, "correct: 0 is outside 1.."),
        ({"targets": {"images": [{"test_index": [], "target": "Bag"}]}}, "test_index: needs at least one"),
        ({"targets": {"images": [{"target": "Bag"}]}}, "targets: images[0]: the key 'test_index' is missing"),
        ({"seeds": []}, "seeds: needs at least one"),
        ({"seeds": [1, 1]}, "seeds: 1 stands there twice"),
        ({"seeds": [-1]}, "seeds: -1 is outside"),
        ({"seeds": ["one"]}, "recipe: seeds[0]: must be a whole number, found 'one'"),
        ({"seeds": True}, "must be a whole number, found True"),
        ({"threads": 0}, "threads: 0 is outside 1..1024; the nearest allowed is 1"),
        ({"name": "a b"}, "name: use letters"),
        ({"data": "sample"}, "recipe: data: must be a table, found 'sample'"),
    ],
)
def test_a_mistake_is_named_in_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        Experiment.from_dict(values(**changes))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_left_out_is_what_was_before() -> None:
    experiment = Experiment.from_dict(values())
    assert [(victim.name, victim.count) for victim in experiment.victims] == [("default", 1)]
    assert experiment.attacks[0].goal_kind == "backdoor"
    assert experiment.attacks[0].known == (0.0,)


def test_kinds_of_victims_change_the_training_or_replace_it() -> None:
    victims = [
        {"name": "same"},
        {"name": "wider", "training": {"width": 32}, "count": 3},
        {"name": "other", "training": {"preset": "cifar10-small"}},
    ]
    pretraining = {"training": {"epochs": 4}}
    experiment = Experiment.from_dict(values(victims=victims, pretraining=pretraining))
    recipes = [experiment.recipe(victim) for victim in experiment.victims]
    assert [(recipe.model, recipe.width) for recipe in recipes] == [
        ("convnet-bn", 16),
        ("convnet-bn", 32),
        ("resnet9", 16),
    ]
    assert [recipe.epochs for recipe in recipes] == [2, 2, 10]
    # What each starts from has its own architecture, and is trained as the recipe says.
    before = [experiment.pretraining_recipe(victim) for victim in experiment.victims]
    assert [(one.model, one.width, one.epochs) for one in before] == [
        ("convnet-bn", 16, 4),
        ("convnet-bn", 32, 4),
        ("resnet9", 16, 4),
    ]


def test_detectors_that_are_asked_otherwise_are_told_apart() -> None:
    detectors = [
        {"name": "ek-fac"},
        {"name": "ek-fac", "answers": "errors", "observations": 50},
        {"name": "ek-fac", "inputs": 4},
    ]
    experiment = Experiment.from_dict(values(detectors=detectors))
    assert [one.label for one in experiment.detectors] == [
        "ek-fac",
        "ek-fac (answers errors)",
        "ek-fac (inputs 4)",
    ]
