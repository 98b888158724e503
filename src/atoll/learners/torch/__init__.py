"""Any `torch.nn.Module` as a learner, trained by autograd or, where it can be, a cohort at once."""

from atoll.errors import require

require("torch", "torch>=2.6,<2.14", "atoll.learners.TorchLearner")

from atoll.learners.torch.initial import redrawn  # noqa: E402
from atoll.learners.torch.learner import TorchLearner  # noqa: E402
from atoll.learners.torch.losses import NextTokens, OfBatch  # noqa: E402

__all__ = ["NextTokens", "OfBatch", "TorchLearner", "redrawn"]
