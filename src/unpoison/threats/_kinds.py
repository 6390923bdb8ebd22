"""Every kind of trigger and goal, imported, so that a stored poison set finds its own by name."""

from __future__ import annotations

from unpoison.threats._additive_trigger import AdditiveTrigger
from unpoison.threats._backdoor import Backdoor
from unpoison.threats._blend_trigger import BlendTrigger
from unpoison.threats._given_images import SelfConcealment, TargetedMisclassification
from unpoison.threats._label_noise import LabelNoise
from unpoison.threats._random_patch_trigger import RandomPatchTrigger
from unpoison.threats._sinusoid_trigger import SinusoidTrigger
from unpoison.threats._trigger import PatchTrigger
from unpoison.threats._warp_trigger import WarpTrigger

GOALS = (Backdoor, LabelNoise, SelfConcealment, TargetedMisclassification)
TRIGGERS = (
    AdditiveTrigger,
    BlendTrigger,
    PatchTrigger,
    RandomPatchTrigger,
    SinusoidTrigger,
    WarpTrigger,
)
