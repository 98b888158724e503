"""The server of the old kind: a strategy and a number of rounds."""

import numpy as np
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp


class Saving(FedAvg):
    def aggregate_fit(self, server_round, results, failures):
        parameters, metrics = super().aggregate_fit(server_round, results, failures)
        if parameters is not None:
            from flwr.common import parameters_to_ndarrays

            np.savez("final_model", *parameters_to_ndarrays(parameters))
        return parameters, metrics


def central(server_round, parameters, config):
    return float(np.abs(parameters[0]).sum()), {"first": float(parameters[0][0])}


def server_fn(context):
    strategy = Saving(
        initial_parameters=ndarrays_to_parameters([np.zeros(2)]),
        evaluate_fn=central,
    )
    rounds = context.run_config["num-server-rounds"]
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=rounds))


app = ServerApp(server_fn=server_fn)
