from ._case import Case as Case
from ._case import Run as Run
from ._page import render as render
from ._page import write_report as write_report

__all__ = ["Case", "Run", "render", "write_report"]
