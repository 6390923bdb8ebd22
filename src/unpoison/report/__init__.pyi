from ._case import Case as Case
from ._case import Outcome as Outcome
from ._case import Run as Run
from ._leaderboard import leaderboard_html as leaderboard_html
from ._leaderboard import leaderboard_latex as leaderboard_latex
from ._leaderboard import leaderboard_markdown as leaderboard_markdown
from ._leaderboard import table_of as table_of
from ._leaderboard import write_leaderboard as write_leaderboard
from ._page import render as render
from ._page import write_report as write_report

__all__ = [
    "Case",
    "Outcome",
    "Run",
    "leaderboard_html",
    "leaderboard_latex",
    "leaderboard_markdown",
    "render",
    "table_of",
    "write_leaderboard",
    "write_report",
]
