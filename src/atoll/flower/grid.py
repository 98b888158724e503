"""The grid: Flower's four verbs between a ServerApp and its clients, on one machine.

Clients are numbered in order and draw from streams of their own, so that what a server samples and
what a client draws depend on the seed alone.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run as FlowerRun
from flwr.supercore.task_identity import TaskIdentity

from atoll.core.random import Key
from atoll.errors import ConfigurationError
from atoll.flower.clients import RAISED, Clients

#: Looking for clients so often, and for so many seconds, is waiting.
LOOKS, LOOKING = 4, 3.0
#: Told of each message and its reply; the number is that of the client.
Watcher = Callable[[int, Message, Message], None]


class LocalGrid(Grid):
    """All clients of an app behind Flower's interface; safe to call from several threads.

    Args:
        clients: who answers.
        count: how many there are.
        key: where their draws come from.
        watch: is told of every message and reply.
    """

    def __init__(self, clients: Clients, count: int, key: Key, watch: Watcher) -> None:
        self._run = FlowerRun.create_empty(run_id=1)
        self._clients, self._count, self._key, self._watch = clients, count, key, watch
        self._lock = threading.Lock()
        self._several = ThreadPoolExecutor(clients.width, "atoll-clients")
        self._begun: list[Future[None]] = []
        self._sent: Counter[int] = Counter()
        self._number = 0
        #: What was sent and nobody has asked for the replies of.
        self._pending: list[tuple[Message, str, Key]] = []
        self._replies: dict[str, Message] = {}
        #: For how long each client was at work on its reply.
        self._seconds: dict[str, float] = {}
        #: How often the server has asked who is there since it last sent something, and since when.
        self._looked, self._since = 0, 0.0
        # A Message reads these when a server makes it; they are the process's own.
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1

    def set_run(self, run: FlowerRun) -> None:
        self._run = run

    @property
    def run(self) -> FlowerRun:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        self._notice_waiting()
        return range(1, self._count + 1)

    def _notice_waiting(self) -> None:
        """Raise if the server looks again and again for clients that will never be there."""
        if threading.current_thread() is not threading.main_thread():
            return  # the old loop looks all the time, beside its work
        now = time.monotonic()
        self._since = self._since if self._looked else now
        self._looked += 1
        if self._looked > LOOKS and now - self._since > LOOKING:
            raise ConfigurationError(
                f"the app waits for more clients than the {self._count} that there are (see "
                "min_available_nodes, or min_available_clients, of its strategy); give it more "
                "with --clients N"
            )

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; their clients answer when replies are asked for, in the order sent."""
        self._looked = 0
        work = [(message, *self._stamped(message)) for message in messages]
        with self._lock:
            self._pending += work
        return [name for _, name, _ in work]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages, once all that was sent is answered."""
        self.settle()
        with self._lock:
            return [self._replies.pop(each) for each in message_ids if each in self._replies]

    def settle(self) -> None:
        """Have everything answered that was sent."""
        with self._lock:
            self._begun += [self._several.submit(self._deliver, *each) for each in self._pending]
            self._pending, begun = [], list(self._begun)
        for each in begun:
            each.result()
        with self._lock:
            self._begun = [each for each in self._begun if not each.done()]

    def close(self) -> None:
        """Let go of the threads that clients answer in."""
        self._several.shutdown(cancel_futures=True)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Replies in the order of the messages; those that come after the time are left out."""
        names = list(self.push_messages(messages))
        replies = list(self.pull_messages(names))
        if timeout is None:
            return replies
        # Its own time: that others were before it on this machine is not a client's doing.
        return [
            reply for name, reply in zip(names, replies, strict=True)
            if self._seconds[name] <= timeout
        ]  # fmt: skip

    def _stamped(self, message: Message) -> tuple[str, Key]:
        """A number for a message, and where its client draws from: settled before any answers."""
        node = message.metadata.dst_node_id
        with self._lock:
            self._number += 1
            self._sent[node] += 1
            # Its loop may look replies up by it.
            message.metadata.__dict__["_message_id"] = name = str(self._number)
            return name, self._key.fold("client", node, self._sent[node])

    def _deliver(self, message: Message, name: str, key: Key) -> None:
        node = message.metadata.dst_node_id
        # Strategies send one content to all, and clients may change what they are given.
        content = RecordDict({k: _copied(record) for k, record in message.content.items()})
        own = Message(
            content, node, message.metadata.message_type, ttl=message.metadata.ttl,
            group_id=message.metadata.group_id,
        )  # fmt: skip
        own.metadata.__dict__["_message_id"] = name
        if 1 <= node <= self._count:
            reply, seconds = self._clients.answer(node - 1, own, key)
        else:
            seconds = 0.0
            reply = Message(Error(RAISED, f"there is no client {node}"), reply_to=own)
        reply.metadata.__dict__["_message_id"] = f"reply-{name}"
        with self._lock:
            self._watch(node - 1, message, reply)
            self._replies[name], self._seconds[name] = reply, seconds


def _copied(record: Any) -> Any:
    """A record of a client's own; what is in an array are bytes, which nobody changes."""
    return record.copy() if isinstance(record, ArrayRecord) else copy.deepcopy(record)
