from ._executors import Executor as Executor
from ._executors import LocalExecutor as LocalExecutor
from ._executors import RayExecutor as RayExecutor
from ._metrics import Comparison as Comparison
from ._metrics import Line as Line
from ._metrics import Mean as Mean
from ._metrics import bootstrap as bootstrap
from ._metrics import clean_accuracy as clean_accuracy
from ._metrics import compare as compare
from ._metrics import leaderboard as leaderboard
from ._metrics import success_rate as success_rate
from ._metrics import tango as tango
from ._plan import Plan as Plan
from ._plan import plan as plan
from ._results import Results as Results
from ._results import recipes_in as recipes_in
from ._schema import Experiment as Experiment
from ._stages import write_row as write_row
from ._store import Outcome as Outcome
from ._store import Stage as Stage
from ._store import Store as Store
from ._sweep import SweepProgress as SweepProgress
from ._sweep import choose_targets as choose_targets
from ._sweep import sweep as sweep

__all__ = [
    "Comparison",
    "Executor",
    "Experiment",
    "Line",
    "LocalExecutor",
    "Mean",
    "Outcome",
    "Plan",
    "RayExecutor",
    "Results",
    "Stage",
    "Store",
    "SweepProgress",
    "bootstrap",
    "choose_targets",
    "clean_accuracy",
    "compare",
    "leaderboard",
    "plan",
    "recipes_in",
    "success_rate",
    "sweep",
    "tango",
    "write_row",
]
