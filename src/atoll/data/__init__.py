"""Data: who holds what. Load or wrap a set, then give its examples to clients."""

from atoll.data.catalogue import load, names
from atoll.data.dataset import Dataset
from atoll.data.encoding import Encoding, Summary, agree, summarize
from atoll.data.examples import Examples
from atoll.data.federated import FederatedData
from atoll.data.gathered import from_clients
from atoll.data.population import from_columns, generated
from atoll.data.sources import (
    from_arrays,
    from_huggingface,
    from_sklearn,
    from_table,
    from_torch,
    from_torchvision,
)
from atoll.data.synthetic import synthetic
from atoll.data.tasks import CLASSIFICATION, MULTILABEL, REGRESSION, TOKENS, Task

__all__ = [
    "CLASSIFICATION",
    "MULTILABEL",
    "REGRESSION",
    "TOKENS",
    "Dataset",
    "Encoding",
    "Examples",
    "FederatedData",
    "Summary",
    "Task",
    "agree",
    "from_arrays",
    "from_clients",
    "from_columns",
    "from_huggingface",
    "from_sklearn",
    "from_table",
    "from_torch",
    "from_torchvision",
    "generated",
    "load",
    "names",
    "summarize",
    "synthetic",
]
