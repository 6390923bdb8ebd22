"""Runs and log: what has been done, how to repeat it in a shell, and every decision."""

from __future__ import annotations

from functools import partial
from typing import Any, final

from unpoison.app._elements import address, button, tag
from unpoison.app._overview import short_verdict
from unpoison.app._work import Work
from unpoison.report import Entry, duration, plain

SHOWN = 200


@final
class Runs:
    """The view of the jobs, searches and decisions of `work`."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._shown: Any = None
        tag("h1", "Runs and log")
        with tag("section", aria_labelledby="jobs"):
            tag("h2", "Work of this session", id="jobs")
            self.jobs = tag("div")
        with tag("section", aria_labelledby="searches"):
            tag("h2", "Searches", id="searches")
            self.searches = tag("div", classes="wide")
        with tag("section", aria_labelledby="log"):
            tag("h2", "Log of decisions", id="log")
            tag("a", "Download the log", "button", href=f"/file/{work.decisions.path.name}")
            self.log = tag("div", classes="wide")
        self.update()

    def update(self) -> None:
        """Show what has changed."""
        work = self.work
        known = ([job.state for job in work.jobs.all], len(work.searches), len(work.decisions.audit))
        if known == self._shown:
            return
        self._shown = known
        for part in (self.jobs, self.searches, self.log):
            part.clear()
        with self.jobs:
            if not work.jobs.all:
                tag("p", "Nothing has been started yet.", "quiet")
            for job in reversed(work.jobs.all):
                with tag("article", classes="job"):
                    tag("h3", f"{job.number}. {job.title}: {job.state}")
                    if job.message:
                        tag(
                            "p",
                            plain(job.message, limit=500),
                            "trouble" if job.state == "failed" else "quiet",
                        )
                    tag("code", job.command)
                    if not job.open:
                        tag("p", f"took {duration(job.seconds)}", "quiet")
                    else:
                        button("Cancel", partial(work.jobs.cancel, job), classes="small")
        with self.searches:
            self._table(
                ("Run", "Input", "Method", "Verdict", "Flagged"),
                [
                    (
                        one.name,
                        " ".join(one.suspects) or "–",
                        one.data.method,
                        short_verdict(one),
                        f"{len(one.data.flagged):,}",
                    )
                    for one in work.searches
                ],
                [address("/investigation", search=one.name) for one in work.searches],
            )
        with self.log:
            audit = work.decisions.audit
            if work.decisions.damaged:
                tag(
                    "p",
                    f"{work.decisions.damaged} lines of the log were cut off and are passed over.",
                    "quiet",
                )
            if len(audit) > SHOWN:
                tag("p", f"The last {SHOWN} of {len(audit):,} entries.", "quiet")
            self._table(
                ("When (UTC)", "What"),
                [(one.at[:19].replace("T", " "), self._told(one)) for one in audit[: -SHOWN - 1 : -1]],
            )

    def _told(self, entry: Entry) -> str:
        if entry.do == "decide":
            named = ", ".join(self.work.name_of(index) for index in entry.examples[:5])
            more = f" and {len(entry.examples) - 5:,} more" if len(entry.examples) > 5 else ""
            return f"{entry.verdict}: {named}{more}"
        if entry.do == "note":
            return plain(
                f"{entry.what} {', '.join(f'{key} {value}' for key, value in entry.facts.items())}", limit=300
            )
        return entry.do

    def _table(
        self, head: tuple[str, ...], rows: list[tuple[str, ...]], links: list[str] | None = None
    ) -> None:
        with tag("table", classes="numbers left"):
            with tag("thead"), tag("tr"):
                for text in head:
                    tag("th", text, scope="col")
            with tag("tbody"):
                for place, row in enumerate(rows):
                    with tag("tr"):
                        for column, text in enumerate(row):
                            with tag("td", "" if links and not column else text):
                                if links and not column:
                                    tag("a", text, href=links[place])
