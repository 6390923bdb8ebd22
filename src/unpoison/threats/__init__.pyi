from ._additive_trigger import AdditiveTrigger as AdditiveTrigger
from ._blend_trigger import BlendTrigger as BlendTrigger
from ._budget import Budget as Budget
from ._goal import Backdoor as Backdoor
from ._goal import Goal as Goal
from ._goal import SelfConcealment as SelfConcealment
from ._goal import TargetedMisclassification as TargetedMisclassification
from ._interchange import read_metapoison as read_metapoison
from ._interchange import read_poison_table as read_poison_table
from ._interchange import read_triple as read_triple
from ._interchange import write_metapoison as write_metapoison
from ._interchange import write_poison_table as write_poison_table
from ._interchange import write_triple as write_triple
from ._mistakes import Mistakes as Mistakes
from ._perturbation import ColorGrid as ColorGrid
from ._perturbation import LInf as LInf
from ._perturbation import Perturbation as Perturbation
from ._perturbation import SumOfPerturbations as SumOfPerturbations
from ._poison_set import PoisonSet as PoisonSet
from ._random_patch_trigger import RandomPatchTrigger as RandomPatchTrigger
from ._setups import Setup as Setup
from ._setups import read_setups as read_setups
from ._sinusoid_trigger import SinusoidTrigger as SinusoidTrigger
from ._trigger import PatchTrigger as PatchTrigger
from ._trigger import Trigger as Trigger
from ._warp_trigger import WarpTrigger as WarpTrigger

__all__ = [
    "AdditiveTrigger",
    "Backdoor",
    "BlendTrigger",
    "Budget",
    "ColorGrid",
    "Goal",
    "LInf",
    "Mistakes",
    "PatchTrigger",
    "Perturbation",
    "PoisonSet",
    "RandomPatchTrigger",
    "SelfConcealment",
    "Setup",
    "SinusoidTrigger",
    "SumOfPerturbations",
    "TargetedMisclassification",
    "Trigger",
    "WarpTrigger",
    "read_metapoison",
    "read_poison_table",
    "read_setups",
    "read_triple",
    "write_metapoison",
    "write_poison_table",
    "write_triple",
]
