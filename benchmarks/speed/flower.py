"""Flower's simulation on Ray: two actors of one core, one thread each.

`--variant default` takes the shipped setting instead; `prox`, `momentum` and `adam` are the client
code that Flower's users write for them.
"""

from __future__ import annotations

import os
from importlib.metadata import version

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch.utils.data import DataLoader, TensorDataset
from workloads import (
    WORKLOADS,
    Data,
    Report,
    arguments,
    cohort,
    loss_of,
    make_model,
    probe_loss,
)

given = arguments()
NAME, VARIANT, CORES = given.workload, given.variant, 2 if given.variant == "default" else 1
w = WORKLOADS[NAME]
client_app = ClientApp()
server_app = ServerApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    torch.set_num_threads(CORES)
    model = make_model(NAME)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    start = [p.detach().clone() for p in model.parameters()]
    # The server names the client, so that every contender trains the same cohorts.
    x, y = Data(NAME, load=False).client(int(message.content["config"]["client"]))
    loader = DataLoader(
        TensorDataset(torch.from_numpy(x), torch.from_numpy(y)),
        batch_size=w["batch"],
        shuffle=True,
    )
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=w["rate"])
    if VARIANT == "momentum":
        optimizer = torch.optim.SGD(model.parameters(), lr=w["rate"] / 10, momentum=0.9)
    elif VARIANT == "adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    model.train()
    for _ in range(w["epochs"]):
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = loss_of(model(inputs), targets)
            if VARIANT == "prox":
                pairs = zip(model.parameters(), start, strict=True)
                loss = loss + 0.005 * sum((p - s).square().sum() for p, s in pairs)
            loss.backward()
            optimizer.step()
    reply = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"train_loss": loss.item(), "num-examples": len(y)}),
        }
    )
    return Message(content=reply, reply_to=message)


class Timed(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        if server_round == 1:
            report.start()
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for message, client in zip(messages, cohort(NAME, server_round - 1), strict=True):
            config = ConfigRecord({"server-round": server_round, "client": int(client)})
            message.content = RecordDict({"arrays": arrays, "config": config})
        return messages

    def aggregate_train(self, server_round, replies):
        out = super().aggregate_train(server_round, replies)
        report.lap()
        return out


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    model = make_model(NAME)
    strategy = Timed(fraction_train=w["cohort"] / w["clients"], fraction_evaluate=0.0)
    arrays = ArrayRecord(model.state_dict())
    result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=given.rounds)
    model.load_state_dict(result.arrays.to_torch_state_dict())
    losses.append(probe_loss(model, NAME))


if __name__ == "__main__":
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    losses: list[float] = []
    report = Report("Flower", given, version("flwr"))
    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=w["clients"],
        backend_config={"client_resources": {"num_cpus": CORES, "num_gpus": 0.0}},
    )
    report.done(losses[0], ray=version("ray"))
