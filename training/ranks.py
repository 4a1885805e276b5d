"""
The processes that train one network together: each takes its share of every step, and all have the same weights after.

A launcher such as ``torchrun`` starts them; the first one, rank 0, decides, writes and speaks for all. For a process by
itself there is :data:`ALONE`, whose methods leave everything as it is.
"""

import inspect
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.rendezvous import rendezvous

from streamer.errors import ReaderError
from streamer.loading import place_of
from training.errors import RankError
from training.norms import share_norms

__all__ = ["ALONE", "Ranks", "gathered"]

T = TypeVar("T")
Tensors = dict[str, dict[str, Tensor]]

# What one rank may take longer than the others: for a validation, or a checkpoint on a slow disk.
_PATIENCE = timedelta(minutes=30)
_CPU = torch.device("cpu")


class Ranks:
    """A process that trains alone; :class:`_Group` does the same for several."""

    rank: int = 0
    """Number of this one."""
    size: int = 1
    """How many there are."""

    @property
    def is_first(self) -> bool:
        """Whether this one decides, writes and speaks."""
        return self.rank == 0

    def share_of(self, batch_size: int) -> int:
        """Return how many samples of a step one rank takes: what goes round evenly, rounded up."""
        return -(-batch_size // self.size)

    def spread(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """
        Return the forward pass whose backward leaves the mean over all ranks as gradients.

        Norms, which are changed in place, take the statistics of all ranks' samples.
        """
        return network

    def weigh(self, loss: Tensor, share: float) -> Tensor:
        """
        Return what to run backward from, so that each sample counts the same on whichever rank it is.

        Args:
            loss: Mean over this rank's samples.
            share: Of this rank in the step's samples, 0..1.
        """
        return loss

    def mean(self, figures: tuple[Tensor, ...], share: float) -> tuple[Tensor, ...]:
        """Return figures of all samples of a step from those of this rank's; scalars, on their device."""
        return figures

    def agree(self, signal: int | None, *, is_due: bool, now: bool = False) -> tuple[int | None, bool]:
        """
        Return whether any rank was asked to stop, by which signal, and whether a checkpoint is due by the first one.

        Called by all ranks after the same step, it tells all of them the same.

        Args:
            signal: What this rank was asked by; to be said again until something comes of it.
            is_due: By this rank's clock.
            now: Wait for what the others say of this step. Else it is what they said after the step before, if that
                was nothing, and nobody waits.
        """
        return signal, is_due

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what the first rank makes, which can be pickled and is small; where it fails, the others end."""
        return make()

    def tensors_from_first(self, tensors: Tensors) -> Tensors:
        """Return tensors of the first rank, on the CPU, by part and name; what others give is not looked at."""
        return tensors

    def wait(self) -> None:
        """Wait until all ranks have come here."""

    def leave(self) -> None:
        """Part from the others, which do the same; harmless when done already."""


ALONE = Ranks()
"""A process by itself."""


@dataclass(frozen=True, slots=True)
class _Question:
    """What all ranks wish after a step, on its way."""

    wishes: Tensor
    work: Any

    def answer(self) -> Tensor:
        self.work.wait()
        return self.wishes


class _Group(Ranks):
    """One of several ranks, in the process group that torch calls the default one."""

    def __init__(self) -> None:
        self.rank = distributed.get_rank()
        self.size = distributed.get_world_size()
        # Of its own, as gradients are on their way while it is used; on the CPU, whatever the device.
        self._talk = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        self._question: _Question | None = None

    def spread(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        share_norms(network, self._talk)
        # What norms count is of all ranks' samples, on each of them: there is nothing to send.
        options = _without_sending_buffers()
        return nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True, **options)

    def weigh(self, loss: Tensor, share: float) -> Tensor:
        return loss * (share * self.size)

    def mean(self, figures: tuple[Tensor, ...], share: float) -> tuple[Tensor, ...]:
        own = torch.stack(figures).detach()
        total = own * share if share else torch.zeros_like(own)  # the mean of nothing is NaN
        distributed.all_reduce(total)
        return total.unbind()

    def agree(self, signal: int | None, *, is_due: bool, now: bool = False) -> tuple[int | None, bool]:
        wishes = torch.tensor([signal or 0, is_due and self.is_first], dtype=torch.int32)
        asked = distributed.all_reduce(wishes, distributed.ReduceOp.MAX, group=self._talk, async_op=True)
        before, self._question = self._question, _Question(wishes, asked)
        if not now and (before is None or not before.answer().any()):
            return None, False
        # What follows settles this question, too: it must not come up again at the next step.
        answer, self._question = self._question.answer(), None
        if before is not None:
            answer = torch.maximum(answer, before.answer())
        number, due = answer.tolist()
        return number or None, bool(due)

    def from_first(self, make: Callable[[], T]) -> T:
        box: list[Any] = [make() if self.is_first else None]
        distributed.broadcast_object_list(box, src=0, group=self._talk, device=_CPU)
        made: T = box[0]
        return made

    def tensors_from_first(self, tensors: Tensors) -> Tensors:
        shapes = self.from_first(
            lambda: [
                (part, name, tensor.shape, tensor.dtype)
                for part, held in tensors.items()
                for name, tensor in held.items()
            ]
        )
        shared: Tensors = {}
        for part, name, shape, dtype in shapes:
            tensor = tensors[part][name].contiguous() if self.is_first else torch.empty(shape, dtype=dtype)
            distributed.broadcast(tensor, src=0, group=self._talk)
            shared.setdefault(part, {})[name] = tensor
        return shared

    def wait(self) -> None:
        distributed.barrier(group=self._talk)

    def leave(self) -> None:
        if distributed.is_initialized():
            distributed.destroy_process_group()


@contextmanager
def gathered(environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """
    Hold the ranks that a launcher has started together with this process; :data:`ALONE` where none has.

    With GPUs each rank takes the one that LOCAL_RANK says.

    Args:
        environment: With RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as ``torchrun`` sets them.

    Raises:
        RankError: The environment makes no sense, or another rank does not come, or ends.
    """
    place = _place(environment)
    if place is None:
        yield ALONE
        return
    rank, size = place
    try:
        ranks = _join(rank, size, environment)
        yield ranks
        # Not on the way out of an error: a rank that is still at work would be waited for.
        ranks.leave()
    except RuntimeError as error:
        if not _is_of_ranks(error):
            raise
        raise RankError(
            f"rank {rank} of {size}: another rank ended or does not answer, so this one ends, too; "
            f"--resume auto goes on from the last checkpoint ({_cause(error)})"
        ) from error


def _join(rank: int, size: int, environment: Mapping[str, str]) -> Ranks:
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(_gpu(rank, environment))
        backend = "cpu:gloo,cuda:nccl"
    with _mortal():
        store = _meeting_place(rank, size, environment)
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
        return _Group()


@contextmanager
def _mortal() -> Iterator[None]:
    """Have a signal end the process: who waits for the others in torch hears of none, and has nothing to clean up."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _meeting_place(rank: int, size: int, environment: Mapping[str, str]) -> Any:
    """Return the store by which ranks find each other."""
    store, *_ = next(rendezvous("env://", rank, size, timeout=_PATIENCE))
    # torchrun keeps its store over a restart, with the addresses of ranks that are dead. On one machine it counts
    # restarts alike for all ranks; for several, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 has it make a new store each time.
    is_one_machine = environment.get("LOCAL_WORLD_SIZE") == str(size)
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0") if is_one_machine else "0"
    return distributed.PrefixStore(attempt, store)  # type: ignore[attr-defined]  # torch's stub lacks it


def _place(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """Return rank and world size; None for a process by itself."""
    try:
        place = place_of(environment)
    except ReaderError as error:
        raise RankError(str(error)) from error
    if place is None or place[1] == 1:
        return None
    rank, size = place
    for variable in ("MASTER_ADDR", "MASTER_PORT"):
        if variable not in environment:
            raise RankError(
                f"{variable} in the environment: missing; with WORLD_SIZE {size} it says where rank 0 is. "
                "`torchrun --nproc-per-node 2 -m sluice train` sets it"
            )
    return rank, size


def _without_sending_buffers() -> dict[str, Any]:
    """Return the option by its name in this version of torch, which warns of the former one."""
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}


def _gpu(rank: int, environment: Mapping[str, str]) -> int:
    count = torch.cuda.device_count()
    given = environment.get("LOCAL_RANK", str(rank % count))
    if not given.isdecimal() or int(given) >= count:
        raise RankError(
            f"LOCAL_RANK in the environment: {given!r}; this machine has {count} GPU(s), one for each rank: "
            f"0 to {count - 1} are allowed"
        )
    return int(given)


def _cause(error: RuntimeError) -> str:
    """Return what torch says, without its place in torch and its advice."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"\[\S+:\d+\] ", "", first).partition(". ")[0]


def _is_of_ranks(error: RuntimeError) -> bool:
    """Tell whether other ranks are the cause; of gloo only the text says so."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error).lower()
