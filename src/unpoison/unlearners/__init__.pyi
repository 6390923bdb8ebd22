from ._registry import UnlearnerCard as UnlearnerCard
from ._registry import describe as describe
from ._registry import get as get
from ._registry import names as names
from ._unlearner import Unlearner as Unlearner
from .fine_tune import FineTune as FineTune
from .retrain import Retrain as Retrain

__all__ = ["FineTune", "Retrain", "Unlearner", "UnlearnerCard", "describe", "get", "names"]
