from ._classification import ClassificationTask as ClassificationTask
from ._task import Batch as Batch
from ._task import Task as Task
