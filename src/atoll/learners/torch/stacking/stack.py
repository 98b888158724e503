"""A stack: the same vectors of C clients, entry by entry, so that products are batched."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from torch import Tensor

from atoll.core.vectors import Entry


class Stack:
    """C clients' arrays in one flat tensor [C * P]: the C copies of each entry lie together.

    So every entry is one contiguous [C, *shape], its first k clients are too, and elementwise
    work is one pass over `flat`. With one client this is the model's own flat vector.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        clients: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.entries, self.clients = tuple(entries), clients
        self.size = sum(entry.size for entry in entries)
        self.flat = torch.empty(clients * self.size, dtype=dtype, device=device)
        self.views: dict[str, Tensor] = {}
        for entry in entries:
            part = self.flat[clients * entry.start : clients * (entry.start + entry.size)]
            self.views[entry.name] = part.view((clients, *entry.shape))

    def alike(self) -> Stack:
        """Another stack of the same form, not filled."""
        return Stack(self.entries, self.clients, dtype=self.flat.dtype, device=self.flat.device)

    def load(self, vector: Tensor, without: Container[str] = ()) -> None:
        """Take one vector [P] for all clients, or their own [C, P]; leave out some entries."""
        if self.clients == 1 and not without:
            self.flat.copy_(vector.reshape(-1))
            return
        for entry in self.entries:
            if entry.name in without:
                continue
            part = vector[..., entry.slice].reshape((*vector.shape[:-1], *entry.shape))
            self.views[entry.name].copy_(part)

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The clients from `start` to `stop`, [stop - start, P]; `flat` itself if there is one."""
        stop = self.clients if stop is None else stop
        if self.clients == 1:
            return self.flat.view(1, -1)
        out = self.flat.new_empty(stop - start, self.size)
        for entry in self.entries:
            out[:, entry.slice] = self.views[entry.name][start:stop].reshape(stop - start, -1)
        return out

    def first(self, clients: int) -> dict[str, Tensor]:
        """Views [clients, *shape] of the first clients, by name."""
        if clients == self.clients:
            return self.views
        return {name: view[:clients] for name, view in self.views.items()}
