from ._registry import UnlearnerCard as UnlearnerCard
from ._registry import describe as describe
from ._registry import get as get
from ._registry import names as names
from ._unlearner import Unlearner as Unlearner
from .bad_teaching import BadTeaching as BadTeaching
from .best_of import BestOf as BestOf
from .fine_tune import FineTune as FineTune
from .potion import Potion as Potion
from .recant import Recant as Recant
from .retrain import Retrain as Retrain
from .scrub import SCRUB as SCRUB
from .ssd import SSD as SSD

__all__ = [
    "SCRUB",
    "SSD",
    "BadTeaching",
    "BestOf",
    "FineTune",
    "Potion",
    "Recant",
    "Retrain",
    "Unlearner",
    "UnlearnerCard",
    "describe",
    "get",
    "names",
]
