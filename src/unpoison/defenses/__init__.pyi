from ._dropping import ControlDrop as ControlDrop
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
from .friendly_noise import FriendlyNoise as FriendlyNoise
from .jpeg import JPEG as JPEG
from .knn_outlier_filter import KNNOutlierFilter as KNNOutlierFilter
from .knn_outlier_filter import outliers as outliers
from .loss_drop import LossDrop as LossDrop
from .maxup import MaxUp as MaxUp
from .mixup import Mixup as Mixup
from .noisy_gradient import NoisyGradient as NoisyGradient
from .random_drop import RandomDrop as RandomDrop
from .recompression_filter import RecompressionFilter as RecompressionFilter
from .recompression_filter import grain as grain
from .recompression_filter import recompression_outliers as recompression_outliers
from .recompression_filter import recompression_scores as recompression_scores

__all__ = [
    "DPSGD",
    "EPIC",
    "JPEG",
    "METHODS",
    "ControlDrop",
    "CutMix",
    "Cutout",
    "DropJudgement",
    "DropReport",
    "DroppingDefense",
    "FriendlyNoise",
    "KNNOutlierFilter",
    "LossDrop",
    "MaxUp",
    "Mixup",
    "NoisyGradient",
    "RandomDrop",
    "RecompressionFilter",
    "describe",
    "get",
    "grain",
    "isolated",
    "names",
    "outliers",
    "recompression_outliers",
    "recompression_scores",
    "register",
]
