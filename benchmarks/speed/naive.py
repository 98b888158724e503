"""The tutorial loop: a deep copy and a DataLoader for each client, state dicts averaged."""

from __future__ import annotations

import copy

import torch
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
w = WORKLOADS[given.workload]
report = Report("tutorial loop", given, torch.__version__)
data = Data(given.workload)
clients = [TensorDataset(*map(torch.from_numpy, data.client(i))) for i in range(len(data))]
model = make_model(given.workload)
report.start()
for number in range(given.rounds):
    states, sizes = [], []
    for i in cohort(given.workload, number):
        local = copy.deepcopy(model)
        optimizer = torch.optim.SGD(local.parameters(), lr=w["rate"])
        local.train()
        for _ in range(w["epochs"]):
            for x, y in DataLoader(clients[i], batch_size=w["batch"], shuffle=True):
                optimizer.zero_grad()
                loss_of(local(x), y).backward()
                optimizer.step()
        states.append(local.state_dict())
        sizes.append(len(clients[i]))
    total = sum(sizes)
    model.load_state_dict(
        {
            name: sum(s[name] * (n / total) for s, n in zip(states, sizes, strict=True))
            for name in states[0]
        }
    )
    report.lap()
report.done(probe_loss(model, given.workload))
