"""The surrogate that a user writes, ``LossConfig(loss_type="custom", surrogate=function)``: what it takes, calls of it, and their checks.

The function gets one number per token of each input that its parameters name, as vectors ``[n]``, and returns the loss of each token. It is
called for all tokens of a call, or for those of a chunk of the head, so it must treat each token by itself.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from grpo_fast.loss import checks
from grpo_fast.loss.surrogate_probe import depends_on_other_tokens, largest_without_advantage, probe_arguments

__all__ = ["SURROGATE_INPUTS", "CustomSurrogate", "Surrogate"]

Surrogate = Callable[..., Tensor]

# What a function may take without the caller's surrogate_inputs, and the value that a token gets there that is not computed.
SURROGATE_INPUTS = {
    "ratio": 1.0,
    "advantages": 0.0,
    "logprobs": 0.0,
    "old_logprobs": 0.0,
    "ref_logprobs": 0.0,
    "rollout_weights": 1.0,
    "entropy": 0.0,
}
DIFFERENTIABLE = ("ratio", "logprobs", "entropy")
BY_POSITION = ("ratio", "advantages", "logprobs")

_numbers = itertools.count()
_known: weakref.WeakValueDictionary[int, CustomSurrogate] = weakref.WeakValueDictionary()


class CustomSurrogate:
    """A function with what its signature says. Get it from ``of``, which returns the same object for the same function."""

    def __init__(self, function: Surrogate):
        self.function, self.name, self.number = function, _name_of(function), next(_numbers)
        self.names: tuple[str, ...] = BY_POSITION  # of the parameters that are passed
        self.required: tuple[str, ...] = BY_POSITION
        self.by_position, self.takes_others = True, False
        self._read_signature()
        self.zero_advantage_loss = self._has_loss_without_advantage()

    @classmethod
    def of(cls, function: Surrogate) -> CustomSurrogate:
        """Return the surrogate of a function.

        Raises:
            TypeError: it cannot be called.
            ValueError: its loss of a token depends on other tokens, or is random.
        """
        if not callable(function):
            raise TypeError(
                f"LossConfig: surrogate is {function!r} ({type(function).__name__}); expected a function with loss_type='custom'. "
                "Fix: surrogate=lambda ratio, advantages: -ratio * advantages, or the name of a function, 'my_loss.py:my_loss'."
            )
        found = next((each for each in _known.values() if each.function is function), None)
        if found is None:
            found = cls(function)
            _known[found.number] = found
        return found

    @classmethod
    def numbered(cls, number: float) -> CustomSurrogate:
        """Return the surrogate with this number, by which operators refer to it."""
        return _known[int(number)]

    def __reduce__(self) -> tuple[Callable[[Surrogate], CustomSurrogate], tuple[Surrogate]]:
        return CustomSurrogate.of, (self.function,)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the parameters that only the caller's surrogate_inputs can give."""
        return tuple(name for name in self.names if name not in SURROGATE_INPUTS)

    def check_inputs(self, given: Mapping[str, object], *, has_reference: bool) -> None:
        """Check that the function gets what it takes.

        Args:
            given: surrogate_inputs.
            has_reference: whether there are ref_logprobs.

        Raises:
            ValueError: names the input.
        """
        for name in given:
            if name in SURROGATE_INPUTS:
                raise ValueError(f"surrogate_inputs has {name!r}; expected other names: the loss gives {name} itself. Fix: rename it.")
            if name not in self.names and not self.takes_others:
                raise ValueError(
                    f"surrogate_inputs has {name!r}, which the surrogate {self.name} does not take; expected names among its parameters, "
                    f"{', '.join(self.names)}. Fix: leave it out, or add the parameter."
                )
        for name in self.required:
            if name not in SURROGATE_INPUTS and name not in given:
                known = ", ".join(SURROGATE_INPUTS)
                raise ValueError(
                    f"surrogate_inputs has no {name!r}, a parameter of the surrogate {self.name}; expected a tensor of one number per "
                    f"token for it, or one of the parameters {known}. Fix: surrogate_inputs={{{name!r}: tensor}}, or rename it."
                )
        if "ref_logprobs" in self.required and not has_reference:
            raise ValueError(f"ref_logprobs is None; expected a tensor like the mask: the surrogate {self.name} takes it. Fix: pass it.")

    def losses(self, inputs: Mapping[str, Tensor | None], computed: Tensor, *, skips_zero_advantages: bool) -> Tensor:
        """Return the loss of each token, like ``computed``.

        Args:
            inputs: the values of SURROGATE_INPUTS and of surrogate_inputs, broadcastable to ``computed``; None: not given.
            computed: bool; other tokens get no gradient, and their losses mean nothing.
            skips_zero_advantages: whether tokens with an advantage of 0 may not be computed.

        Raises:
            TypeError, ValueError, RuntimeError: the function failed, or returned something invalid; names it and its inputs.
        """
        arguments: dict[str, Tensor] = {}
        for name, x in inputs.items():
            if name not in self.names and (name in SURROGATE_INPUTS or not self.takes_others):
                continue
            if x is not None:  # selected, so that no gradient flows to other tokens: 0 * inf is NaN
                arguments[name] = torch.where(computed, x, SURROGATE_INPUTS.get(name, 0.0)).reshape(-1)
            elif name in self.required:
                raise ValueError(f"{name} is not known here, but the surrogate {self.name} takes it; expected a function without it.")
        if torch.compiler.is_compiling():
            losses = self.call(arguments)
        else:
            try:
                losses = self.call(arguments)
            except Exception as error:
                message = f"the surrogate {self.name} raised {type(error).__name__}: {error}. It was called with {_described(arguments)}."
                raise RuntimeError(message) from error
        self._check_result(losses, arguments)
        if checks.value_checks_wanted(computed):
            self._check_values(losses, arguments, computed.reshape(-1), skips_zero_advantages)
        return losses.view(computed.shape)

    def call(self, arguments: Mapping[str, Tensor]) -> Tensor:
        """Call the function."""
        if not self.by_position:
            return self.function(**arguments)
        named = {name: x for name, x in arguments.items() if name not in BY_POSITION}
        return self.function(*(arguments[name] for name in BY_POSITION), **named)

    def _read_signature(self) -> None:
        try:
            called = self.function.forward if isinstance(self.function, torch.nn.Module) else self.function
            parameters = list(inspect.signature(called).parameters.values())
        except (TypeError, ValueError):  # some functions written in C have none
            return
        kinds = {each.kind for each in parameters}
        self.takes_others = inspect.Parameter.VAR_KEYWORD in kinds
        self.by_position = inspect.Parameter.VAR_POSITIONAL in kinds or inspect.Parameter.POSITIONAL_ONLY in kinds
        named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
        first = BY_POSITION if self.by_position else ()
        self.names = (*first, *(each.name for each in named if each.name not in first))
        self.required = (*first, *(each.name for each in named if each.name not in first and each.default is each.empty))

    def _has_loss_without_advantage(self) -> bool:
        """Return whether the loss or its gradient can be other than 0 where the advantage is 0, as far as random inputs show.

        Raises:
            ValueError: the loss of a token depends on other tokens, or is random.
        """
        if torch.compiler.is_compiling():
            return True
        try:  # what is wrong with the function is reported when it is called in earnest: it may need another device, or other values
            arguments = probe_arguments(self.names)
            difference, size = depends_on_other_tokens(self.call, arguments), largest_without_advantage(self.call, arguments)
        except Exception:
            return True
        if difference:
            raise self._not_elementwise(difference)
        return size != 0  # also NaN

    def _not_elementwise(self, difference: float) -> ValueError:
        return ValueError(
            f"the surrogate {self.name} returned other losses for a part of the tokens than for all of them (by {difference:.3g}); "
            "expected a function of each token by itself, without randomness. Fix: no means, sums or sorting over tokens: compute what "
            "mixes tokens before, and pass it in surrogate_inputs."
        )

    def _check_result(self, losses: object, arguments: Mapping[str, Tensor]) -> None:
        like = next(iter(arguments.values()))
        if not isinstance(losses, Tensor):
            raise TypeError(self._unexpected(f"{losses!r:.100} ({type(losses).__name__})", "Fix: return a tensor", arguments))
        if losses.dtype != like.dtype:
            fix = f"Fix: return loss.to({next(iter(arguments))}.dtype)"
            raise TypeError(self._unexpected(f"a tensor of {losses.dtype}", fix, arguments))
        if losses.shape != like.shape or losses.device != like.device:
            fix = "Fix: no sum or mean: the aggregation of LossConfig does that"
            raise ValueError(self._unexpected(_described_tensor(losses), fix, arguments))
        if torch.is_grad_enabled() and any(x.requires_grad for x in arguments.values()) and not losses.requires_grad:
            raise ValueError(
                f"the surrogate {self.name} returned a loss without a gradient; expected one that depends on ratio, logprobs or entropy. "
                "Fix: do not detach them all."
            )

    def _unexpected(self, returned: str, fix: str, arguments: Mapping[str, Tensor]) -> str:
        expected = f"expected the loss of each token, {_described_tensor(next(iter(arguments.values())))}"
        return f"the surrogate {self.name} returned {returned} for {_described(arguments)}; {expected}. {fix}."

    def _check_values(self, losses: Tensor, arguments: dict[str, Tensor], computed: Tensor, skips_zero_advantages: bool) -> None:
        """Check losses and, when they are computed, gradients."""
        self._check_finite("loss", losses, arguments, computed)
        for name in DIFFERENTIABLE:
            x = arguments.get(name)
            if x is not None and x.requires_grad:
                what = f"derivative with respect to {name}"
                x.register_hook(functools.partial(self._check_finite, what, arguments=arguments, computed=computed))
        if checks.is_debugging() and (difference := depends_on_other_tokens(self.call, arguments)):
            raise self._not_elementwise(difference)
        if skips_zero_advantages and losses.requires_grad and losses.numel():
            selected = {name: x[computed] for name, x in arguments.items()}
            if (size := largest_without_advantage(self.call, selected)) != 0:
                raise ValueError(
                    f"the surrogate {self.name} has a loss or derivative of {size:.3g} for advantages of 0, whose tokens are not computed; "
                    "expected 0. Fix: LossConfig(..., zero_advantage_loss=True)."
                )

    def _check_finite(self, what: str, x: Tensor | None, arguments: Mapping[str, Tensor], computed: Tensor) -> None:
        if x is None:  # autograd calls hooks with None for a gradient that is not defined
            return
        bad = computed & ~x.isfinite()
        if bool(bad.any()):
            n = checks.first_index(bad)[0]
            values = ", ".join(f"{name} = {given[n].item():.6g}" for name, given in arguments.items())
            raise ValueError(
                f"the {what} of the surrogate {self.name} is {x[n].item()} for {values}; expected a finite number. Fix: clamp before exp, "
                "log or a division; torch.where after them does not help the gradient."
            )


def _name_of(function: object) -> str:
    function = function.func if isinstance(function, functools.partial) else function
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    module = getattr(function, "__module__", None)
    return f"{module}:{name}" if module else name


def _described_tensor(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"


def _described(arguments: Mapping[str, Tensor]) -> str:
    return f"{', '.join(arguments)}, each {_described_tensor(next(iter(arguments.values())))}"
