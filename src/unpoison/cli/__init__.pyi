from ._main import main as main
from ._run import RunRecord as RunRecord
from ._run import run_schema as run_schema

__all__ = ["RunRecord", "main", "run_schema"]
