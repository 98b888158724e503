"""FedJAX's federated averaging, compiled, on both cores. Needs init.npz, which `run.py` writes.

`--variant` momentum or adam changes the local optimiser.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

if not hasattr(jax, "tree_map"):  # fedjax 0.0.17 needs it; newer releases of jax have dropped it
    jax.tree_map = jax.tree_util.tree_map
import fedjax
from fedjax.algorithms import fed_avg
from workloads import DATA, WORKLOADS, Data, Report, arguments, cohort

given = arguments()
NAME = given.workload
w = WORKLOADS[NAME]
report = Report("FedJAX", given, "0.0.17")
data = Data(NAME)
images = w["model"].startswith("cnn")


def channels_last(x):
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if images else x


held = {}
for i in range(len(data)):
    x, y = data.client(i)
    held[i] = {"x": channels_last(x), "y": y.astype(np.int32)}
federated = fedjax.InMemoryFederatedData(held)
saved = np.load(DATA / NAME / "init.npz")
weights = [saved[f"arr_{i}"] for i in range(len(saved.files))]
if images:
    side = (w["shape"][1] - 4) // 2
    weights[0], weights[2] = weights[0].transpose(2, 3, 1, 0), weights[2].transpose(2, 3, 1, 0)
    weights[4] = weights[4].reshape(128, 64, side, side).transpose(2, 3, 1, 0).reshape(-1, 128)
    weights[6] = weights[6].T
else:
    weights = [p.T if p.ndim == 2 else p for p in weights]
weights = [jnp.asarray(p) for p in weights]


def forward(p, x):
    if images:
        for k in (0, 2):
            x = jax.lax.conv_general_dilated(
                x, p[k], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + p[k + 1])
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        x, p = x.reshape(x.shape[0], -1), p[4:]
    for i in range(0, len(p), 2):
        x = x @ p[i] + p[i + 1]
        if i + 2 < len(p):
            x = jax.nn.relu(x)
    return x


def cross_entropy(batch, logits):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], 1)[:, 0]


model = fedjax.Model(
    init=lambda rng: weights,
    apply_for_train=lambda p, b, rng: forward(p, b["x"]),
    apply_for_eval=lambda p, b: forward(p, b["x"]),
    train_loss=cross_entropy,
    eval_metrics={},
)
local = {
    "momentum": lambda: fedjax.optimizers.sgd(w["rate"] / 10, momentum=0.9),
    "adam": lambda: fedjax.optimizers.adam(0.001),
}.get(given.variant, lambda: fedjax.optimizers.sgd(w["rate"]))()
algorithm = fed_avg.federated_averaging(
    fedjax.model_grad(model),
    local,
    fedjax.optimizers.sgd(1.0),
    fedjax.ShuffleRepeatBatchHParams(batch_size=w["batch"], num_epochs=w["epochs"]),
)
px, py = data.probe()
inputs, targets = channels_last(px), py.astype(np.int32)


def probe(p):
    pieces = [slice(i, i + 50) for i in range(0, len(targets), 50)]
    losses = [cross_entropy({"y": targets[s]}, forward(p, inputs[s])) for s in pieces]
    return float(np.concatenate(losses).mean())


state = algorithm.init(model.init(None))
initial = state.params
keys = jax.random.split(jax.random.PRNGKey(0), w["cohort"])
report.start()
for number in range(given.rounds):
    ids = [int(i) for i in cohort(NAME, number)]
    clients = [(i, ds, key) for (i, ds), key in zip(federated.get_clients(ids), keys, strict=True)]
    state, _ = algorithm.apply(state, clients)
    jax.block_until_ready(state.params)
    report.lap()
report.done(probe(state.params), probe(initial), jax=jax.__version__)
