"""Log: the work of this session with the commands that repeat it, and every decision."""

from __future__ import annotations

from functools import partial
from typing import Any, final

from unpoison.app._elements import button, table, tag
from unpoison.app._work import Work
from unpoison.report import Entry, duration, plain

SHOWN = 200


@final
class Log:
    """The view of the jobs and decisions of `work`."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._shown: Any = None
        tag("h1", "Log")
        with tag("section", aria_labelledby="jobs"):
            tag("h2", "Work of this session", id="jobs")
            self.jobs = tag("div")
        with tag("section", aria_labelledby="log"):
            tag("h2", "Decisions", id="log")
            tag("a", "Download the log", "button", href=f"/file/{work.decisions.path.name}")
            self.log = tag("div")
        self.update()

    def update(self) -> None:
        """Show what has changed."""
        work = self.work
        known = ([job.state for job in work.jobs.all], len(work.decisions.audit), work.decisions.damaged)
        if known == self._shown:
            return
        self._shown = known
        self.jobs.clear()
        self.log.clear()
        with self.jobs:
            if not work.jobs.all:
                tag("p", "Nothing has been started yet.", "quiet")
            for job in reversed(work.jobs.all):
                with tag("article", classes="job"):
                    tag("h3", f"{job.number}. {job.title}: {job.state}")
                    if job.message:
                        failed = job.state == "failed"
                        tag("p", plain(job.message, limit=500), "trouble" if failed else "quiet")
                    tag("code", job.command)
                    if job.open:
                        button("Cancel", partial(work.jobs.cancel, job), classes="small")
                    else:
                        tag("p", f"took {duration(job.seconds)}", "quiet")
        with self.log:
            audit = work.decisions.audit
            if work.decisions.damaged:
                told = f"{work.decisions.damaged:,} lines of the log are damaged and are passed over."
                tag("p", told, "trouble")
            if len(audit) > SHOWN:
                tag("p", f"The last {SHOWN} of {len(audit):,} entries.", "quiet")
            table(
                ("When (UTC)", "What"),
                [(one.at[:19].replace("T", " "), self._told(one)) for one in audit[: -SHOWN - 1 : -1]],
            )

    def _told(self, entry: Entry) -> str:
        if entry.do == "decide":
            named = ", ".join(self.work.name_of(index) for index in entry.examples[:5])
            more = f" and {len(entry.examples) - 5:,} more" if len(entry.examples) > 5 else ""
            return f"{entry.verdict}: {named}{more}"
        if entry.do == "note":
            facts = ", ".join(f"{key} {value}" for key, value in entry.facts.items())
            return plain(f"{entry.what} {facts}", limit=300)
        return entry.do
