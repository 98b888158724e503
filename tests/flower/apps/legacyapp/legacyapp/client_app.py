"""The client of the old kind: a NumPyClient that moves towards its own number."""

import numpy as np
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp


class Client(NumPyClient):
    def __init__(self, partition):
        self.partition = partition

    def fit(self, parameters, config):
        (weights,) = parameters
        goal = np.full(2, float(self.partition))
        return [(weights + goal) / 2], 1 + self.partition, {"moved": float(goal[0])}

    def evaluate(self, parameters, config):
        (weights,) = parameters
        return float(np.abs(weights - self.partition).mean()), 1 + self.partition, {"ok": 1.0}


def client_fn(context):
    return Client(context.node_config["partition-id"]).to_client()


app = ClientApp(client_fn=client_fn)
