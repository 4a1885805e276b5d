"""All tensors of a run between two steps, for its checkpoint, and back."""

from pathlib import Path

import torch
from torch import Tensor

from training import checkpoint, randomness
from training.checkpoint import Parts, Saved
from training.errors import CheckpointError
from training.loop import Loop
from training.ranks import Ranks


def parts_of(loop: Loop) -> Parts:
    """Return the tensors of a run: weights, their average, the optimizer's moments, and the random generators."""
    moments = loop.optimizer.state_dict()["state"]
    parts: dict[str, dict[str, Tensor]] = {
        "weights": loop.network.state_dict(),
        "optimizer": {f"{number}.{name}": tensor for number, held in moments.items() for name, tensor in held.items()},
        "random": randomness.tensors(),
    }
    if loop.average is not None:
        parts["average"] = loop.average.network.state_dict()
    return parts


def from_first(ranks: Ranks, checkpoints: Path) -> Saved | None:
    """
    Return the newest checkpoint that the first rank finds; the others need not see its disk. None: there is none.

    Raises:
        CheckpointError: All there are are damaged.
    """
    saved = checkpoint.newest(checkpoints) if ranks.is_first and checkpoint.is_any(checkpoints) else None
    found = ranks.from_first(lambda: None if saved is None else (saved.folder, saved.state, saved.complaints))
    if found is None:
        return None
    folder, state, complaints = found
    return Saved(folder, state, ranks.tensors_from_first({} if saved is None else saved.parts), complaints)


def restore(loop: Loop, saved: Saved) -> None:
    """
    Make ``loop``, which has not taken a step, the one that was saved; seeds random generators with it.

    Raises:
        CheckpointError: It was saved by a loop with another network, optimizer or average.
    """
    try:
        loop.network.load_state_dict(saved.parts["weights"])
        if loop.average is not None:
            loop.average.network.load_state_dict(saved.parts["average"])
        _restore_optimizer(loop.optimizer, saved.parts["optimizer"])
        randomness.restore(saved.parts["random"], saved.state.random)
        loop.resume(saved.state.loop)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{saved.folder}: made by another run: {error}") from error


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        # A fused step walks through memory: moments lie there as their weights do, channels last.
        like = torch.empty_like(parameter) if tensor.shape == parameter.shape else torch.empty_like(tensor)
        optimizer.state[parameter][name] = like.to(parameter.device).copy_(tensor)
