"""Before and after: what healing has changed, measured on the test set and on the traced inputs."""

from __future__ import annotations

from typing import Any, final

from unpoison._statistics import Proportion
from unpoison.app._elements import Sight, figures, select, tag
from unpoison.app._overview import note
from unpoison.app._searches import Healed
from unpoison.app._work import Work
from unpoison.report import Answers, percent

SHOWN = 24


@final
class Compare:
    """The view of the healed models of `work`, one at a time beside the model before."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.name = work.healed[-1].name if work.healed else ""
        self._shown: Any = None
        tag("h1", "Before and after healing")
        self.body = tag("div")
        self.update()

    def update(self) -> None:
        """Show what has changed."""
        work = self.work
        if not self.name and work.healed:
            self.name = work.healed[-1].name
        healed = next((one for one in work.healed if one.name == self.name), None)
        known = (self.name, len(work.healed), len(work.answers), healed is not None and len(healed.answers))
        if known == self._shown:
            return
        self._shown = known
        self.body.clear()
        with self.body:
            if healed is None:
                tag("p", "No model has been healed yet. Decide which examples to blame, then heal.")
                tag("a", "Investigation", "button", href="/investigation")
                return
            if len(work.healed) > 1:
                select("Healed model", [(one.name, one.name) for one in work.healed], self.name, self._choose)
            self._figures(healed)
            for one in work.inputs:
                before, after = work.answers.get(one.kind), healed.answers.get(one.kind)
                if before is not None and after is not None:
                    self._changes(one.kind, one.title, before, after)
            if healed.model is None:
                tag(
                    "p",
                    "unpoison cannot build the healed network by itself, so that only its record is shown.",
                    "quiet",
                )

    def _choose(self, name: str) -> None:
        self.name = name
        self.update()

    def _figures(self, healed: Healed) -> None:
        results = healed.record.results
        shown = []
        for name, words in (("clean_accuracy", "Clean accuracy"), ("attack_success", "Attack success")):
            rates = [_rate(results, f"{name}_{when}") for when in ("before", "after")]
            if rates[0] is not None and rates[1] is not None:
                text = " → ".join(percent(rate.rate) for rate in rates if rate is not None)
                shown.append((f"{words}, before → after", text, f"after: {note(rates[1])}"))
        removed = results.get("removed", results.get("flagged"))
        if removed is not None:
            shown.append(("Examples forgotten", f"{removed:,}", f"by {results.get('method') or 'retrain'}"))
        figures(shown)

    def _changes(self, kind: str, title: str, before: Answers, after: Answers) -> None:
        work = self.work
        with tag("section"):
            tag("h2", title)
            with tag("table", classes="numbers"):
                tag("caption", "Share of inputs that are answered rightly, by class")
                with tag("thead"), tag("tr"):
                    for text in ("Class", "Before", "After", "n"):
                        tag("th", text, scope="col")
                with tag("tbody"):
                    pairs = list(zip(before.by_class, after.by_class, strict=True))
                    for label, (first, last) in enumerate(pairs):
                        if first.trials:
                            _row(work.class_name(label), first, last)
                    _row("All", before.accuracy, after.accuracy)
            changed = (before.answers != after.answers).nonzero()[0]
            fixed = int((after.answers[changed] == before.labels[changed]).sum())
            broken = int((before.answers[changed] == before.labels[changed]).sum())
            tag(
                "p",
                f"{len(changed):,} of {len(before):,} answers have changed: {fixed:,} are right now, "
                f"{broken:,} were right before.",
            )
            wrong_before = before.answers[changed] != before.labels[changed]
            shown = [*changed[wrong_before].tolist(), *changed[~wrong_before].tolist()][:SHOWN]
            with tag("div", classes="grid"):
                for row in shown:
                    with tag("article", classes="tile"):
                        Sight(work, kind).show(row, f"input {row}")
                        with tag("p", classes="names"):
                            tag("span", work.class_name(int(before.labels[row])), "truth")
                        right = after.answers[row] == before.labels[row]
                        tag("p", f"before {work.class_name(int(before.answers[row]))}", "quiet")
                        with tag("p"):
                            tag("span", "after ", "quiet")
                            tag("strong", work.class_name(int(after.answers[row])))
                            tag("span", " (right)" if right else " (wrong)")


def _row(name: str, first: Proportion, last: Proportion) -> None:
    with tag("tr"):
        tag("th", name, scope="row")
        tag("td", percent(first.rate))
        tag("td", percent(last.rate))
        tag("td", f"{last.trials:,}")


def _rate(results: Any, name: str) -> Proportion | None:
    found = results.get("measured", {}).get(name)
    return None if found is None else Proportion(found["successes"], found["trials"])
