"""Where data sets come from: arrays, scikit-learn, PyTorch, tables and Hugging Face."""

from atoll.data.sources.arrays import from_arrays
from atoll.data.sources.huggingface import from_huggingface
from atoll.data.sources.sklearn import from_sklearn
from atoll.data.sources.table import from_table
from atoll.data.sources.torch import from_torch, from_torchvision

__all__ = [
    "from_arrays",
    "from_huggingface",
    "from_sklearn",
    "from_table",
    "from_torch",
    "from_torchvision",
]
