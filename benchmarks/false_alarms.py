"""False alarms of the calibrated detector.

    python -m benchmarks.false_alarms [--json] [--errors 40]

How often does tracing find poison where there is none? A model is trained on the bundled sample, unpoisoned,
and its errors on the test images are traced one at a time and in order; every "poison found" is a false
alarm.
"""

from __future__ import annotations

from benchmarks._harness import Bench, counts, main, say, timed
from benchmarks._tables import Row, Section, rate
from unpoison import data, detectors, workflow
from unpoison.detectors import Observation
from unpoison.training import Recipe, predict

ALARMS = "false alarms"


def measure(bench: Bench) -> None:
    """Trace errors and count the alarms."""
    splits = data.sample()
    assert splits.test is not None
    test, p_values, taken, alarms = splits.test, [], 0.0, 0
    trained = workflow.train(splits.train, Recipe.preset("sample"))
    answers = predict(trained.model, test.images).argmax(1)
    wrong = (answers != test.labels).nonzero()[:, 0]
    for index in wrong[: 2 if bench.options.quick else bench.options.errors].tolist():
        observation = Observation(test.images[index], int(answers[index]), int(test.labels[index]))
        spent, findings = timed(lambda one=observation: workflow.trace(trained, splits.train, one))
        taken, alarms = taken + spent, alarms + findings.poison_found
        p_values.append(round(findings.p_value or 0.0, 4))
        say(f"test image {index}: p = {p_values[-1]}")
    bench.rates[ALARMS] = {"successes": alarms, "trials": len(p_values)}
    bench.rates["clean accuracy"] = counts(workflow.measure(trained, test).clean_accuracy)
    bench.seconds["tracing all"] = taken
    level = detectors.get("calibrated").false_alarm_level
    bench.work = {"stated level": level, "p values": p_values}


TITLE = "false alarms of `calibrated` on errors of an unpoisoned model"
ROWS = [Row(TITLE, "stated level: 1 %", rate(ALARMS, interval=True))]
SECTION = Section.of(__name__, __doc__, rows=ROWS)


if __name__ == "__main__":
    main(measure, errors=40)
