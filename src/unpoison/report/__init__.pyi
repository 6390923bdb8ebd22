from ._data import Outcome as Outcome
from ._data import ReportData as ReportData
from ._leaderboard import leaderboard_html as leaderboard_html
from ._leaderboard import write_leaderboard as write_leaderboard
from ._page import render as render
from ._page import write_report as write_report
from ._table import leaderboard_latex as leaderboard_latex
from ._table import leaderboard_markdown as leaderboard_markdown
from ._table import table_of as table_of

__all__ = [
    "Outcome",
    "ReportData",
    "leaderboard_html",
    "leaderboard_latex",
    "leaderboard_markdown",
    "render",
    "table_of",
    "write_leaderboard",
    "write_report",
]
