from ._adversarial_training import adversarially_trained as adversarially_trained
from ._attack import Attack as Attack
from ._attack import CraftRequest as CraftRequest
from ._methods import METHODS as METHODS
from ._methods import describe as describe
from ._methods import get as get
from ._methods import names as names
from ._methods import register as register
from .badnets import BadNets as BadNets
from .blended import Blended as Blended
from .bullseye_polytope import BullseyePolytope as BullseyePolytope
from .convex_polytope import ConvexPolytope as ConvexPolytope
from .feature_collision import FeatureCollision as FeatureCollision
from .gradient_matching import GradientMatching as GradientMatching
from .hidden_trigger import HiddenTrigger as HiddenTrigger
from .label_consistent import LabelConsistent as LabelConsistent
from .label_flip import LabelFlip as LabelFlip
from .metapoison import MetaPoison as MetaPoison
from .sig import Sig as Sig
from .sleeper_agent import SleeperAgent as SleeperAgent
from .smooth_trigger import SmoothTrigger as SmoothTrigger
from .wanet import WaNet as WaNet

__all__ = [
    "METHODS",
    "Attack",
    "BadNets",
    "Blended",
    "BullseyePolytope",
    "ConvexPolytope",
    "CraftRequest",
    "FeatureCollision",
    "GradientMatching",
    "HiddenTrigger",
    "LabelConsistent",
    "LabelFlip",
    "MetaPoison",
    "Sig",
    "SleeperAgent",
    "SmoothTrigger",
    "WaNet",
    "adversarially_trained",
    "describe",
    "get",
    "names",
    "register",
]
