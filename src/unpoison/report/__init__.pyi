from ._case import Case as Case
from ._case import Outcome as Outcome
from ._case import Run as Run
from ._page import render as render
from ._page import write_report as write_report

__all__ = ["Case", "Outcome", "Run", "render", "write_report"]
