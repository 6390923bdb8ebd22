from ._dropping import DropJudgement as DropJudgement
from ._dropping import DroppingDefense as DroppingDefense
from ._dropping import DropReport as DropReport
from ._methods import METHODS as METHODS
from ._methods import describe as describe
from ._methods import get as get
from ._methods import names as names
from ._methods import register as register
from .cutmix import CutMix as CutMix
from .cutout import Cutout as Cutout
from .dp_sgd import DPSGD as DPSGD
from .epic import EPIC as EPIC
from .epic import isolated as isolated
from .feature_squeezing import FeatureSqueezing as FeatureSqueezing
from .feature_squeezing import fragile as fragile
from .feature_squeezing import grain as grain
from .feature_squeezing import suspicion as suspicion
from .friendly_noise import FriendlyNoise as FriendlyNoise
from .isolation import Isolation as Isolation
from .isolation import strays as strays
from .jpeg import JPEG as JPEG
from .loss_drop import LossDrop as LossDrop
from .maxup import MaxUp as MaxUp
from .mixup import Mixup as Mixup
from .noisy_gradient import NoisyGradient as NoisyGradient
from .random_drop import RandomDrop as RandomDrop

__all__ = [
    "DPSGD",
    "EPIC",
    "JPEG",
    "METHODS",
    "CutMix",
    "Cutout",
    "DropJudgement",
    "DropReport",
    "DroppingDefense",
    "FeatureSqueezing",
    "FriendlyNoise",
    "Isolation",
    "LossDrop",
    "MaxUp",
    "Mixup",
    "NoisyGradient",
    "RandomDrop",
    "describe",
    "fragile",
    "get",
    "grain",
    "isolated",
    "names",
    "register",
    "strays",
    "suspicion",
]
