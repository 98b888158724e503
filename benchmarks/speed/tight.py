"""The plain tight loop: one model as views of one flat vector, tensors indexed, one foreach step.

`--variant` takes prox, scaffold, momentum, adam or clip, each written as tightly.
"""

from __future__ import annotations

import torch
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
report = Report("tight loop", given, torch.__version__)
data = Data(given.workload)
clients = [tuple(map(torch.from_numpy, data.client(i))) for i in range(len(data))]
model = make_model(given.workload)
parameters = list(model.parameters())
flat = torch.nn.utils.parameters_to_vector(parameters).detach().clone()
at = 0
for parameter in parameters:
    parameter.data = flat[at : at + parameter.numel()].view_as(parameter)
    at += parameter.numel()
views = [parameter.data for parameter in parameters]


def like(vector: torch.Tensor) -> list[torch.Tensor]:
    """Views of another flat vector in the parameters' shapes."""
    parts, at = [], 0
    for parameter in parameters:
        parts.append(vector[at : at + parameter.numel()].view_as(parameter))
        at += parameter.numel()
    return parts


variant, rate = given.variant, w["rate"]
shared, total = flat.clone(), torch.zeros_like(flat)
anchor, velocity, constant = like(shared), torch.zeros_like(flat), torch.zeros_like(flat)
speeds, corrections = like(velocity), like(constant)
controls: dict[int, torch.Tensor] = {}
control, change = torch.zeros_like(flat), torch.zeros_like(flat)
if variant == "momentum":
    rate /= 10
report.start()
for number in range(given.rounds):
    chosen = cohort(given.workload, number)
    total.zero_()
    change.zero_()
    examples = sum(len(clients[i][1]) for i in chosen)
    for i in chosen:
        x, y = clients[i]
        flat.copy_(shared)
        velocity.zero_()
        if variant == "adam":
            for parameter in parameters:
                parameter.requires_grad_()
            optimizer = torch.optim.Adam(parameters, lr=0.001, fused=True)
        if variant == "scaffold":
            own = controls.setdefault(int(i), torch.zeros_like(flat))
            torch.sub(control, own, out=constant)
        steps = 0
        for _ in range(w["epochs"]):
            order = torch.randperm(len(y))
            pairs = zip(x[order].split(w["batch"]), y[order].split(w["batch"]), strict=True)
            for xb, yb in pairs:
                gradients = torch.autograd.grad(loss_of(model(xb), yb), parameters)
                steps += 1
                if variant == "adam":
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        parameter.grad = gradient
                    optimizer.step()
                    continue
                if variant == "momentum":
                    torch._foreach_mul_(speeds, 0.9)
                    torch._foreach_add_(speeds, gradients)
                    gradients = speeds
                elif variant == "prox":
                    torch._foreach_add_(gradients, views, alpha=0.01)
                    torch._foreach_add_(gradients, anchor, alpha=-0.01)
                elif variant == "scaffold":
                    torch._foreach_add_(gradients, corrections)
                torch._foreach_add_(views, gradients, alpha=-rate)
        weight = len(y) / examples
        if variant == "scaffold":
            new = own - control + (shared - flat) / (steps * rate)
            change.add_(new - own, alpha=1 / len(data))
            controls[int(i)] = new
            weight = 1 / len(chosen)
        if variant == "clip":
            delta = flat - shared
            delta.mul_(min(1.0, 10.0 / max(float(delta.norm()), 1e-12)))
            total.add_(delta, alpha=weight)
        else:
            total.add_(flat, alpha=weight)
    if variant == "clip":
        shared.add_(total)
    else:
        shared.copy_(total)
    control.add_(change)
    report.lap()
flat.copy_(shared)
report.done(probe_loss(model, given.workload))
