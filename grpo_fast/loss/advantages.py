"""Group-relative advantages: the public function, its argument checks, and the choice between operator and reference."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import grpo_fast.ops.group_advantages  # noqa: F401  defines the operator
from grpo_fast.loss import reference
from grpo_fast.loss.checks import value_checks_wanted
from grpo_fast.ops import extension
from grpo_fast.ops.backends import forced, select

__all__ = ["GroupAdvantages", "group_advantages"]

SCALES = ("none", "group", "batch", "mean", "tokens")  # the position is the number the operator gets (csrc/group_advantages.h)
BASELINES = ("mean", "leave_one_out")
NORMALIZATIONS = ("sum_then_normalize", "normalize_then_sum")
_LARGEST_REWARD = torch.finfo(torch.float32).max  # its square is finite in float64, in which the advantages are computed


class GroupAdvantages(NamedTuple):
    """The result of ``group_advantages``; on the device of the rewards, without gradient."""

    advantages: Tensor  # [B] float32
    mean: Tensor  # [G] float32: mean of each group's (weighted, summed) reward; 0 for a group without rewards
    std: Tensor  # [G] float32: its unbiased standard deviation; 0 for fewer than two rewards
    degenerate: Tensor  # [G] bool: the group's rewards are all equal, or fewer than two apply, so that they compare nothing


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_offsets: Tensor | None = None,
    scale: str = "group",
    baseline: str = "mean",
    reward_weights: Tensor | Sequence[float] | None = None,
    normalize: str = "sum_then_normalize",
    eps: float = 1e-4,
    lengths: Tensor | None = None,
    exclude_degenerate: bool = False,
    pass_at_k: int | None = None,
) -> GroupAdvantages:
    """Return the advantage of each completion over the other completions of its prompt (GRPO, arXiv:2402.03300).

    With several rewards, ``x_i = sum_k w_k r_ik`` over those that apply. n, mean and std (unbiased) are taken of x over the group of i::

        baseline="mean"            A_i = x_i - mean                              GRPO, arXiv:2402.03300
        baseline="leave_one_out"   A_i = x_i - mean of the n - 1 others          RLOO, arXiv:2402.14740;  = (x_i - mean) n / (n - 1)
        scale="group"              A_i / (std + eps)                             GRPO, arXiv:2402.03300
        scale="batch"              A_i / (std of x over the whole batch + eps)   arXiv:2508.08221
        scale="none"               A_i                                           Dr. GRPO, arXiv:2503.20783
        scale="mean"               A_i / (mean + eps)                            MaxRL, arXiv:2602.02710
        scale="tokens"             (A_i - mean of A) / (std of A + eps), both over the tokens of the batch
                                                                                 REINFORCE++, arXiv:2501.03262

    ``normalize="normalize_then_sum"`` is GDPO (arXiv:2601.05242): each reward is centred and divided by its own std + eps within the group,
    the results are summed with the weights, and the sum is divided by its std over the batch, + eps (its mean over the batch is 0). A
    reward that varies little within a group thus has the same influence as one that varies a lot, and completions whose summed rewards are
    equal can still have different advantages.

    ``scale="tokens"`` with prompts as groups is the paper's REINFORCE++-baseline, and with the whole batch as one group its REINFORCE++
    without a KL penalty in the reward. Each token of a completion counts, so that long completions weigh more.

    ``pass_at_k=k`` maximises the chance that the best of k completions is right ("Pass@k Training", arXiv:2508.10751, in its analytical
    form). A set of k of the group's n completions has the reward of its best one, and A_i is the mean of that over the sets with completion
    i, minus the mean over all sets, divided by the standard deviation over all sets + eps, or not divided with ``scale="none"``. Rewards
    need not be 0 and 1. A group is degenerate if fewer than k completions are worse than its best one, so that every set has a best one.

    A reward of NaN does not apply to that completion. A completion to which no reward applies has the advantage 0 and is left out of every
    mean and std. A group of equal rewards gets advantages of exactly 0, not a rounding error divided by eps; with ``scale="tokens"`` the
    mean over the tokens is subtracted from these too, as in the paper, unless ``exclude_degenerate`` leaves them out.

    Args:
        rewards: ``[B]`` or ``[B, R]``, one column per reward function; any real dtype, any strides. A group's completions are consecutive.
        group_size: completions per prompt, if it is the same for all prompts; it must divide B.
        group_offsets: ``[G+1]`` int32 or int64, for groups of different sizes: group g is ``rewards[group_offsets[g] :
            group_offsets[g + 1]]`` and may be empty. Exactly one of ``group_size`` and ``group_offsets`` is required.
        scale: ``"group"``, ``"batch"``, ``"none"``, ``"mean"`` (rewards must be at least 0) or ``"tokens"`` (needs ``lengths``).
        baseline: ``"mean"`` or ``"leave_one_out"``.
        reward_weights: ``[R]``, a tensor or a sequence of numbers; None = all 1. A tensor on the rewards' device saves a copy to a GPU.
        normalize: ``"sum_then_normalize"`` or ``"normalize_then_sum"``; the latter needs ``scale="group"``.
        eps: added to every standard deviation or mean that is divided by; at least 0.
        lengths: ``[B]``, how many tokens of each completion are in the loss; only with ``scale="tokens"``.
        exclude_degenerate: leave degenerate groups out of the statistics of the batch (``scale`` of ``"batch"`` and ``"tokens"``, GDPO), as
            if the batch did not have them; their advantages are then exactly 0 with every scale. To leave their tokens out of the loss's
            denominators too, mask them.
        pass_at_k: k, at least 1 and below ``group_size``; None = off. Only with ``scale`` of ``"group"`` or ``"none"`` and the defaults of
            ``baseline`` and ``normalize``. The time grows with the square of the group's size.

    Returns:
        ``GroupAdvantages(advantages [B], mean [G], std [G], degenerate [G])``; mean and std are those of the rewards.
        Accumulated in float64 in two passes, returned in float32. Bitwise the same from run to run, and on the CPU whatever the number of
        threads (the reference on a GPU excepted).

    Raises:
        ValueError: a shape, a value or a combination is wrong; the message names the argument, its value, what was expected and the fix.
            Values of tensors (infinite rewards, offsets out of order) are checked on the CPU, and on every device with
            ``GRPO_FAST_CHECK=1``. Without the check an infinite reward makes the group's mean infinite or NaN, and offsets out of order
            never cause a read out of bounds.
        TypeError: an argument is of the wrong type.

    Example:
        >>> import torch
        >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0, 0.7, 0.7, 0.7, 0.7]), group_size=4).advantages
        tensor([ 0.8659, -0.8659, -0.8659,  0.8659,  0.0000,  0.0000,  0.0000,  0.0000])
        >>> group_advantages(torch.tensor([1.0, 0.0, 0.5]), group_offsets=torch.tensor([0, 2, 3]), scale="none").degenerate
        tensor([False,  True])
        >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), group_size=4, scale="mean", eps=0).advantages
        tensor([ 3., -1., -1., -1.])
        >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), group_size=4, pass_at_k=2, eps=0).advantages
        tensor([ 1.0000, -0.3333, -0.3333, -0.3333])
    """
    _check_rewards(rewards)
    _check_groups(rewards, group_size, group_offsets)
    _check_name("scale", scale, SCALES)
    _check_name("baseline", baseline, BASELINES)
    _check_name("normalize", normalize, NORMALIZATIONS)
    if normalize == "normalize_then_sum" and scale != "group":
        _fail(
            "scale",
            repr(scale),
            "'group' with normalize='normalize_then_sum', which divides by the group's and then by the batch's std itself",
        )
    if isinstance(eps, bool) or not isinstance(eps, (int, float, numbers.Real)):
        raise TypeError(f"group_advantages: eps is {eps!r} ({type(eps).__name__}); expected a number, 1e-4 for instance.")
    if not 0 <= eps < math.inf:
        _fail("eps", repr(eps), "a finite number of at least 0")
    _check_pass_at_k(pass_at_k, group_size, scale, baseline, normalize)
    _check_bool("exclude_degenerate", exclude_degenerate)
    tokens = _checked_lengths(rewards, lengths, scale)
    weights = None if reward_weights is None else _checked_weights(rewards, reward_weights)

    values = rewards.detach()
    if values.dtype not in (torch.float32, torch.float64):
        values = values.to(torch.float32 if values.dtype in (torch.float16, torch.bfloat16) else torch.float64)
    if value_checks_wanted(values):
        _check_finite("rewards", values)
        if scale == "mean":
            _check_not_negative(values, weights)

    if _operator_computes(values.device):
        return GroupAdvantages(
            *torch.ops.grpo_fast.group_advantages(
                values.contiguous(),
                None if group_offsets is None else group_offsets.contiguous(),
                int(group_size or 0),
                weights,
                SCALES.index(scale),
                baseline == "leave_one_out",
                normalize == "normalize_then_sum",
                float(eps),
                tokens,
                exclude_degenerate,
                int(pass_at_k or 0),
            )
        )
    advantages, mean, std, degenerate = reference.group_advantages(
        values,
        group_size=int(group_size or 0),
        group_offsets=group_offsets,
        scale=scale,
        baseline=baseline,
        reward_weights=weights,
        normalize=normalize,
        eps=float(eps),
        lengths=tokens,
        exclude_degenerate=exclude_degenerate,
        k=None if pass_at_k is None else int(pass_at_k),
    )
    return GroupAdvantages(advantages.float(), mean.float(), std.float(), degenerate)


def _operator_computes(device: torch.device) -> bool:
    """Return whether the compiled operator computes the advantages on this device, rather than the reference.

    On a GPU the default backend is Triton, which has no kernel for this operator: the CUDA kernel is used unless a backend is forced.
    """
    if (device.type == "cpu" or forced() is not None) and select(device) == "reference":
        return False
    return _has_kernel(device.type)


def _has_kernel(device_type: str) -> bool:
    if device_type not in ("cpu", "cuda"):
        return False
    return extension.load() and torch._C._dispatch_has_kernel_for_dispatch_key("grpo_fast::group_advantages", device_type.upper())


# The effect of torch.compiler.assume_constant_result without importing torch._dynamo; the result does not change within a process.
_has_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _fail(name: str, got: str, expected: str) -> None:
    raise ValueError(f"group_advantages: {name} is {got}; expected {expected}.")


def _check_name(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"group_advantages: {name} is {value!r} ({type(value).__name__}); expected one of the names {', '.join(allowed)}.")
    if value not in allowed:
        _fail(name, repr(value), f"one of {', '.join(allowed)}")


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"group_advantages: {name} is {value!r} ({type(value).__name__}); expected True or False.")


def _check_rewards(rewards: Any) -> None:
    if not isinstance(rewards, Tensor):
        raise TypeError(f"group_advantages: rewards is a {type(rewards).__name__}; expected a tensor: torch.tensor(rewards).")
    if rewards.is_complex():
        raise TypeError(f"group_advantages: rewards has dtype {rewards.dtype}; expected a real dtype.")
    if rewards.dim() not in (1, 2):
        _fail("rewards", f"of shape {tuple(rewards.shape)}", "[B] or [B, R]: rewards.flatten() if the groups are rows")
    if rewards.dim() == 2 and rewards.shape[1] == 0:
        _fail("rewards", f"of shape {tuple(rewards.shape)}", "at least one reward: R >= 1")


def _check_groups(rewards: Tensor, group_size: Any, group_offsets: Any) -> None:
    batch = rewards.shape[0]
    if (group_size is None) == (group_offsets is None):
        both = "both given" if group_offsets is not None else "both missing"
        raise ValueError(
            f"group_advantages: group_size and group_offsets are {both}; expected exactly one: the size if all groups have the same size, "
            "the offsets [G+1] if not."
        )
    if group_offsets is None:
        if isinstance(group_size, bool) or not isinstance(group_size, (int, numbers.Integral)):
            raise TypeError(f"group_advantages: group_size is {group_size!r} ({type(group_size).__name__}); expected an int.")
        if group_size < 1:
            _fail("group_size", str(group_size), "at least 1, the number of completions per prompt")
        if batch % group_size != 0:
            _fail(
                "group_size", f"{group_size} and rewards has {batch} rows", "a divisor of it; use group_offsets for groups of unequal sizes"
            )
        return

    if not isinstance(group_offsets, Tensor):
        got = type(group_offsets).__name__
        raise TypeError(
            f"group_advantages: group_offsets is a {got}; expected a tensor [G+1] of int32 or int64: torch.tensor(group_offsets)."
        )
    if group_offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"group_advantages: group_offsets has dtype {group_offsets.dtype}; expected int32 or int64: group_offsets.long().")
    if group_offsets.dim() != 1 or group_offsets.shape[0] == 0:
        _fail("group_offsets", f"of shape {tuple(group_offsets.shape)}", "[G+1]: 0, then where each group ends")
    if group_offsets.device != rewards.device:
        _fail("group_offsets", f"on {group_offsets.device}", f"rewards' device {rewards.device}: group_offsets.to(rewards.device)")
    if group_offsets.shape[0] == 1 and batch > 0:
        _fail("group_offsets", f"of one element, no group, and rewards has {batch} rows", "[G+1]: 0, then where each group ends")
    if value_checks_wanted(group_offsets):
        _check_offset_values(group_offsets, batch)


def _check_offset_values(group_offsets: Tensor, batch: int) -> None:
    first, last = int(group_offsets[0]), int(group_offsets[-1])
    if first != 0:
        _fail("group_offsets[0]", str(first), "0: offsets begin with the first group's first row")
    if last != batch:
        _fail("group_offsets[-1]", str(last), f"{batch}, the rows of rewards: offsets end with the last group's end")
    decreasing = group_offsets[1:] < group_offsets[:-1]
    if decreasing.any():
        g = int(decreasing.nonzero()[0]) + 1
        before, after = int(group_offsets[g - 1]), int(group_offsets[g])
        fix = "offsets that never decrease (an empty group repeats its offset); are these sizes? Then use their cumulative sum"
        _fail(f"group_offsets[{g}]", f"{after} after {before}", fix)


def _check_finite(name: str, values: Tensor) -> None:
    wrong = values.abs() > _LARGEST_REWARD
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        got = str(values[tuple(where)].item())
        fix = "finite values within float32's range (NaN where a reward does not apply); clamp them or correct the reward function"
        _fail(f"{name}[{', '.join(map(str, where))}]", got, fix)


def _check_not_negative(values: Tensor, weights: Tensor | None) -> None:
    rewards = values if values.dim() == 2 else values.unsqueeze(1)
    weighted = rewards.double() if weights is None else rewards.double() * weights
    total = weighted.nansum(1)
    if (total < 0).any():
        where = int((total < 0).nonzero()[0])
        fix = "Fix: rewards of at least 0 (add a constant), or another scale"
        expected = f"at least 0 with scale='mean', which divides by the group's mean. {fix}"
        _fail(f"the weighted sum of rewards[{where}]", str(total[where].item()), expected)


def _check_pass_at_k(pass_at_k: Any, group_size: int | None, scale: str, baseline: str, normalize: str) -> None:
    if pass_at_k is None:
        return
    if isinstance(pass_at_k, bool) or not isinstance(pass_at_k, (int, numbers.Integral)):
        raise TypeError(f"group_advantages: pass_at_k is {pass_at_k!r} ({type(pass_at_k).__name__}); expected an int, or None.")
    pass_at_k = int(pass_at_k)
    if pass_at_k < 1:
        _fail("pass_at_k", str(pass_at_k), "at least 1, or None")
    if group_size is not None and pass_at_k >= group_size:
        why = "since with fewer completions than that every advantage is 0. Fix: a smaller k, or larger groups"
        _fail("pass_at_k", str(pass_at_k), f"less than group_size = {group_size}, {why}")
    if scale not in ("group", "none"):
        _fail("scale", repr(scale), "'group' or 'none' with pass_at_k, which has a standard deviation of its own")
    if baseline != "mean":
        _fail("baseline", repr(baseline), "'mean' with pass_at_k, whose baseline is the mean over all sets of k completions")
    if normalize != "sum_then_normalize":
        _fail("normalize", repr(normalize), "'sum_then_normalize' with pass_at_k, which compares the summed rewards")


def _checked_lengths(rewards: Tensor, lengths: Any, scale: str) -> Tensor | None:  # [B] float64
    if (lengths is None) == (scale == "tokens"):
        state, expected = ("missing", "[B], the tokens of each completion,") if lengths is None else ("given", "None")
        raise ValueError(f"group_advantages: lengths is {state} with scale={scale!r}; expected {expected} with it.")
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        raise TypeError(f"group_advantages: lengths is a {type(lengths).__name__}; expected a tensor [B]: torch.tensor(lengths).")
    if lengths.is_complex():
        raise TypeError(f"group_advantages: lengths has dtype {lengths.dtype}; expected a real dtype.")
    if tuple(lengths.shape) != (rewards.shape[0],):
        _fail("lengths", f"of shape {tuple(lengths.shape)}", f"[B = {rewards.shape[0]}], the tokens of each completion")
    if lengths.device != rewards.device:
        _fail("lengths", f"on {lengths.device}", f"rewards' device {rewards.device}: lengths.to(rewards.device)")
    tokens = lengths.detach().double().contiguous()
    if value_checks_wanted(tokens):
        wrong = ~((tokens >= 0) & (tokens <= _LARGEST_REWARD))
        if wrong.any():
            where = int(wrong.nonzero()[0])
            _fail(f"lengths[{where}]", str(tokens[where].item()), "a number of tokens of at least 0")
    return tokens


def _checked_weights(rewards: Tensor, reward_weights: Tensor | Sequence[float]) -> Tensor:  # [R] float64
    count = rewards.shape[1] if rewards.dim() == 2 else 1
    if not isinstance(reward_weights, Tensor):
        try:
            reward_weights = torch.tensor(reward_weights, dtype=torch.float64, device=rewards.device)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"group_advantages: reward_weights is {reward_weights!r}; expected a tensor [R = {count}] or a sequence of {count} numbers."
            ) from error
    if reward_weights.is_complex():
        raise TypeError(f"group_advantages: reward_weights has dtype {reward_weights.dtype}; expected a real dtype.")
    if tuple(reward_weights.shape) != (count,):
        _fail("reward_weights", f"of shape {tuple(reward_weights.shape)}", f"[R = {count}], a weight for each reward")
    if reward_weights.device != rewards.device:
        _fail("reward_weights", f"on {reward_weights.device}", f"rewards' device {rewards.device}: reward_weights.to(rewards.device)")
    weights = reward_weights.detach().double().contiguous()
    if value_checks_wanted(weights):
        if weights.isnan().any():
            _fail("reward_weights", str(weights.tolist()), "numbers: 0 for a reward that is only logged")
        _check_finite("reward_weights", weights)
    return weights
