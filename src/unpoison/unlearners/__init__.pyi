from ._methods import METHODS as METHODS
from ._methods import describe as describe
from ._methods import get as get
from ._methods import names as names
from ._methods import register as register
from ._unlearner import Healed as Healed
from ._unlearner import Request as Request
from ._unlearner import Unlearner as Unlearner
from .bad_teaching import BadTeaching as BadTeaching
from .best_of import BestOf as BestOf
from .fine_tune import FineTune as FineTune
from .potion import Potion as Potion
from .relabel import Relabel as Relabel
from .retrain import Retrain as Retrain
from .scrub import SCRUB as SCRUB
from .ssd import SSD as SSD

__all__ = [
    "METHODS",
    "SCRUB",
    "SSD",
    "BadTeaching",
    "BestOf",
    "FineTune",
    "Healed",
    "Potion",
    "Relabel",
    "Request",
    "Retrain",
    "Unlearner",
    "describe",
    "get",
    "names",
    "register",
]
