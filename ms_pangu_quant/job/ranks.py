"""The processes of one msrun job, and how they tell one another what they found.

Tensors of a network that is cut over ranks meet inside its graph, through MindFormers' own collectives. All else
(statistics, rounded layers, the news that a step is done) is a Python value exchanged here: over TCP, through rank 0, and
for as long as it takes. MindSpore's collectives on the CPU cannot do that: they give up when a rank is half a minute late
(rounding a layer takes longer), and have neither float64 nor a maximum nor a barrier.

A rank that ends breaks its connection, so that the others end at once and say so, on whatever node they are.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from multiprocessing.connection import Client, Connection, Listener
from operator import add
from typing import Any, TypeVar

from ms_pangu_quant.errors import BackendError, RankLostError

ROLE = "MS_ROLE"  # msrun sets it: MS_SCHED in the process that brings the ranks together, MS_WORKER in each rank
_GREETING = 256  # bytes of the message in which rank 0 says where it listens
Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among the `size` of its job, number `rank`.

    Every rank must make the same calls in the same order. links: of rank 0 to ranks 1, 2, ..., of another rank to rank 0.
    """

    rank: int = 0
    size: int = 1
    links: Sequence[Connection] = field(default=(), repr=False)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def fold(self, value: Value, merge: Callable[[Value, Value], Value]) -> Value:
        """merge(merge(rank 0's value, rank 1's), rank 2's) and so on, by rank 0 for all: the same bits everywhere."""
        if self.is_first:
            others = (self._receive(number) for number in range(1, self.size))
            return self._send_all(reduce(merge, others, value))
        self._send(0, value)
        return self._receive(0)  # type: ignore[no-any-return]

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value, in the order of ranks."""
        return self.fold([value], add)

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What rank 0 makes; the others wait for it."""
        return self._send_all(make()) if self.is_first else self._receive(0)

    def meet(self) -> None:
        """Wait until every rank is here."""
        self.gather(None)

    def agree(self, what: str, value: object) -> None:
        """Raises BackendError where ranks do not have the same value, such as the hash of each node's copy of a file."""
        different = [number for number, other in enumerate(self.gather(value)) if other != value]
        if different:
            raise BackendError(
                f"rank {self.rank} and rank {different[0]} have another {what}; give all nodes the same files and arguments"
            )

    def _send_all(self, value: Value) -> Value:
        for number in range(1, self.size):
            self._send(number, value)
        return value

    def _link(self, number: int) -> Connection:
        return self.links[number - 1] if self.is_first else self.links[0]

    def _send(self, number: int, value: object) -> None:
        try:
            self._link(number).send(value)
        except OSError:
            raise _gone(number) from None

    def _receive(self, number: int) -> Any:
        try:
            return self._link(number).recv()
        except (OSError, EOFError):
            raise _gone(number) from None


def _gone(number: int) -> RankLostError:
    return RankLostError(f"rank {number} has ended before its work was done; its log says why")


ALONE = Ranks()
_current = ALONE


def current() -> Ranks:
    """The job this process has joined; one rank of one, where it was not started by msrun."""
    return _current


def in_job() -> bool:
    return os.environ.get(ROLE) == "MS_WORKER"


def job_size() -> int:
    """Ranks of the job msrun has started this process for, joined or not; 1 where it has not."""
    return int(os.environ["MS_WORKER_NUM"]) if in_job() else 1


def join() -> Ranks:
    """Meet the other ranks, once; network.runtime.start() does it. Raises BackendError if they do not come."""
    global _current
    if _current is not ALONE or not in_job():
        return _current
    from mindspore.communication import get_group_size, get_rank, init

    try:
        init()
        rank, size = get_rank(), get_group_size()
        _current = connect(rank, size, _greet) if size > 1 else ALONE
    except (RuntimeError, OSError) as error:
        raise BackendError(f"the ranks of the job did not come together: {error}") from None
    return _current


def connect(rank: int, size: int, greet: Callable[[bytes], bytes]) -> Ranks:
    """greet(message) is called by every rank at about the same time and returns rank 0's message."""
    if rank == 0:
        key = secrets.token_bytes(32)
        with Listener((_own_address(), 0), backlog=size, authkey=key) as listener:
            host, port = listener.address
            greet(b"%s %d %s" % (host.encode(), port, key.hex().encode()))
            links = dict(_accept(listener) for _ in range(1, size))
        return Ranks(0, size, [links[number] for number in range(1, size)])
    host, port, key = greet(b"").split()
    link = Client((host.decode(), int(port)), authkey=bytes.fromhex(key.decode()))
    link.send(rank)
    return Ranks(rank, size, [link])


def _accept(listener: Listener) -> tuple[int, Connection]:
    link = listener.accept()
    return link.recv(), link


def _own_address() -> str:
    """The address of this node on the network it shares with the scheduler's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MS_SCHED_HOST"], int(os.environ["MS_SCHED_PORT"])))  # sends nothing
        return str(probe.getsockname()[0])


def _greet(message: bytes) -> bytes:
    """The one message that goes through MindSpore, a byte in each int32: it has just let all ranks in at once."""
    import mindspore as ms
    from mindspore import Tensor, ops

    together = ops.AllGather()(Tensor(list(message.ljust(_GREETING)), ms.int32)).asnumpy()
    return bytes(together[:_GREETING].tolist())
