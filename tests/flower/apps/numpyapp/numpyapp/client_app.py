"""The client: ten steps of gradient descent, and how often it was asked."""

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from numpyapp.task import gradient, load

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    partition = context.node_config["partition-id"]
    if partition == context.run_config["failing-client"]:
        raise RuntimeError("the disk is full")
    x, y = load(partition)
    (weights,) = msg.content["arrays"].to_numpy_ndarrays()
    for _ in range(10):
        weights = weights - context.run_config["learning-rate"] * gradient(weights, x, y)
    asked = int(context.state.get("asked", MetricRecord({"times": 0}))["times"]) + 1
    context.state["asked"] = MetricRecord({"times": asked})
    metrics = MetricRecord({"num-examples": len(x), "asked": asked, "noise": np.random.rand()})
    return Message(RecordDict({"arrays": ArrayRecord([weights]), "metrics": metrics}), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    x, y = load(context.node_config["partition-id"])
    (weights,) = msg.content["arrays"].to_numpy_ndarrays()
    loss = float(np.mean((x @ weights - y) ** 2))
    metrics = MetricRecord({"num-examples": len(x), "eval_loss": loss})
    return Message(RecordDict({"metrics": metrics}), reply_to=msg)
