from ._budget import Budget as Budget
from ._goal import Backdoor as Backdoor
from ._goal import Goal as Goal
from ._goal import TargetedMisclassification as TargetedMisclassification
from ._poison_set import PoisonSet as PoisonSet
from ._trigger import PatchTrigger as PatchTrigger
from ._trigger import Trigger as Trigger

__all__ = ["Backdoor", "Budget", "Goal", "PatchTrigger", "PoisonSet", "TargetedMisclassification", "Trigger"]
