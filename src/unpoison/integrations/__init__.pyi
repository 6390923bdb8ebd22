from ._estimator import FeatureDetector as FeatureDetector
from ._estimator import LogitOutliers as LogitOutliers
from ._tracking import MLflow as MLflow
from ._tracking import Tracker as Tracker
from ._tracking import WandB as WandB
from ._tracking import metrics_of as metrics_of
from ._tracking import parameters_of as parameters_of
from ._tracking import track as track
