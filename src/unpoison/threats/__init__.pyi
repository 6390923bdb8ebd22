from ._additive_trigger import AdditiveTrigger as AdditiveTrigger
from ._backdoor import Backdoor as Backdoor
from ._blend_trigger import BlendTrigger as BlendTrigger
from ._budget import Budget as Budget
from ._given_images import SelfConcealment as SelfConcealment
from ._given_images import TargetedMisclassification as TargetedMisclassification
from ._goal import Goal as Goal
from ._label_noise import LabelNoise as LabelNoise
from ._make_goal import find_class as find_class
from ._make_goal import make_goal as make_goal
from ._make_goal import make_trigger as make_trigger
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
from .interchange import read_metapoison as read_metapoison
from .interchange import read_poison_table as read_poison_table
from .interchange import read_triple as read_triple
from .interchange import write_metapoison as write_metapoison
from .interchange import write_poison_table as write_poison_table
from .interchange import write_triple as write_triple

__all__ = [
    "AdditiveTrigger",
    "Backdoor",
    "BlendTrigger",
    "Budget",
    "ColorGrid",
    "Goal",
    "LInf",
    "LabelNoise",
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
    "find_class",
    "make_goal",
    "make_trigger",
    "read_metapoison",
    "read_poison_table",
    "read_setups",
    "read_triple",
    "write_metapoison",
    "write_poison_table",
    "write_triple",
]
