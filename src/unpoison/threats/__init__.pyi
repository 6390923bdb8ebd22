from ._budget import Budget as Budget
from ._goal import Backdoor as Backdoor
from ._goal import Goal as Goal
from ._goal import SelfConcealment as SelfConcealment
from ._goal import TargetedMisclassification as TargetedMisclassification
from ._perturbation import ColorGrid as ColorGrid
from ._perturbation import LInf as LInf
from ._perturbation import Perturbation as Perturbation
from ._perturbation import SumOfPerturbations as SumOfPerturbations
from ._poison_set import PoisonSet as PoisonSet
from ._trigger import PatchTrigger as PatchTrigger
from ._trigger import Trigger as Trigger

__all__ = [
    "Backdoor",
    "Budget",
    "ColorGrid",
    "Goal",
    "LInf",
    "PatchTrigger",
    "Perturbation",
    "PoisonSet",
    "SelfConcealment",
    "SumOfPerturbations",
    "TargetedMisclassification",
    "Trigger",
]
