"""Models of JAX as learners: pure functions, Flax (NNX and Linen), and Keras on this backend."""

from atoll.errors import require

require("jax", "jax", "atoll.learners.jax")

from atoll.learners.jax.learner import JaxLearner  # noqa: E402
from atoll.learners.jax.models import Model, linen, nnx, pure  # noqa: E402

__all__ = ["JaxLearner", "Model", "linen", "nnx", "pure"]
