"""Validation of logits (or hidden states), token ids, mask and scoring settings, and their conversion to one form.

In that form logits or hidden states are ``[B, T or T + 1, ...]`` and every other tensor is ``[B, T]`` or broadcastable to it; a packed
``[N]`` batch becomes one row. Nothing is computed or written before all checks have passed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_fast.loss import checks
from grpo_fast.loss.support import Support, check_support
from grpo_fast.ops.backends import select

__all__ = ["TokenBatch", "TokenInputs", "logprob_inputs", "token_inputs"]

ANY_VOCABULARY = 1 << 62  # with vocabulary parallelism: the size of the whole vocabulary is not known before the processes exchange theirs
TEMPERATURE_FIX = "Pass the temperature that sampled the tokens; greedy decoding (0) has no policy to train."


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """The validated main tensor of a call, and its mask. The other arguments of the call are validated against these two."""

    scored: Tensor  # logits [B, T, V] or [B, T + 1, V]; hidden states: D in place of V; log-probabilities: [B, T]
    mask: Tensor  # bool [B, T]
    shape: torch.Size  # of the mask as given: [B, T] or [N]
    name: str = "logits"  # of ``scored``, for messages

    @property
    def packed(self) -> bool:
        return len(self.shape) == 1

    @property
    def sizes(self) -> str:
        """The arguments from which the sizes of the others follow, for messages."""
        return self.name

    def optional(self, name: str, x: Tensor | None, *, one_column: bool = False) -> Tensor | None:
        """Return None for None, else ``per_token`` of an argument that is not given per sequence."""
        return None if x is None else self.per_token(name, x, like_sequences=False, one_column=one_column)

    def per_token(self, name: str, x: Tensor, *, like_sequences: bool, one_column: bool = False) -> Tensor:
        """Validate a floating-point argument shaped like token_ids, and return it as ``[B, T]``, or as ``[B, 1]`` if given per sequence.

        Args:
            name: of the argument, for messages.
            like_sequences: whether ``[B]`` is allowed.
            one_column: whether ``[B, 1]`` is allowed.

        Raises:
            TypeError, ValueError: the dtype, device, layout or shape is wrong.
        """
        checks.tensor(name, x, like=self.scored, like_name=self.name)
        x = x.detach() if x.requires_grad else x  # no backend gives it a gradient
        if self.packed:
            checks.shape(name, x, (tuple(self.shape), "[N]"), source=self.sizes)
            return x.unsqueeze(0)
        sequences, length = self.shape
        allowed: list[tuple[tuple[int, ...], str]] = [((sequences, length), "[B, T]")]
        if like_sequences:
            allowed.append(((sequences,), "[B]"))
        if one_column:
            allowed.append(((sequences, 1), "[B, 1]"))
        checks.shape(name, x, *allowed, source=self.sizes)
        return x.unsqueeze(1) if x.dim() == 1 else x

    def given_index(self, index: list[int]) -> list[int]:
        """Return the index of a token in the caller's tensors from its index in ``[B, T]``."""
        return index[1:] if self.packed else index

    def like_given(self, x: Tensor) -> Tensor:
        """Return a ``[B, T]`` result in the shape of the caller's token_ids."""
        return x.squeeze(0) if self.packed else x


@dataclass(frozen=True, kw_only=True)
class TokenInputs(TokenBatch):
    """Logits, or the hidden states from which a head computes them, with token ids and scoring settings: validated, in one form."""

    token_ids: Tensor  # int64 [B, T]
    temperatures: Tensor | None  # float, broadcastable to [B, T]; None: one number for all
    temperature: float
    softcap: float | None
    logit_scale: float
    support: Support | None = None  # of all positions of [B, T]

    @property
    def sizes(self) -> str:
        return f"{self.name} and token_ids"


def logprob_inputs(logprobs: Tensor, mask: Tensor) -> TokenBatch:
    """Validate log-probabilities ``[B, T]``, which a caller passes in place of logits, and their mask.

    Raises:
        TypeError, ValueError: names the argument, what it was, what was expected and the fix.
    """
    checks.tensor("logprobs", logprobs, like=None)
    if logprobs.dim() != 2:
        raise ValueError(f"logprobs has shape {list(logprobs.shape)}; expected [B, T].")
    return TokenBatch(scored=logprobs, mask=checked_mask(mask, logprobs, "logprobs"), shape=logprobs.shape, name="logprobs")


def token_inputs(
    scored: Tensor,
    token_ids: Tensor,
    *,
    mask: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    support: Support | None = None,
    name: str = "logits",
    vocabulary: int | None = None,
) -> TokenInputs:
    """Validate logits or hidden states, token ids, mask and scoring settings.

    Args:
        name: ``"logits"``, or the name of the hidden states in messages.
        vocabulary: the number of logits that a head computes from the hidden states; None: ``scored`` are logits.

    Raises:
        TypeError, ValueError: names the argument, its value, what was expected and the fix.
    """
    _check_scored(name, scored, token_ids)
    number, softcap, logit_scale = checked_scoring(temperature, softcap, logit_scale)
    packed = token_ids.dim() == 1
    if mask is None:
        bool_mask = torch.ones_like(token_ids, dtype=torch.bool)
    else:
        bool_mask = checked_mask(mask, token_ids, "token_ids", scored=name)
    inputs = TokenInputs(
        scored=scored.unsqueeze(0) if packed else scored,
        token_ids=token_ids.unsqueeze(0) if packed else token_ids,
        mask=bool_mask.unsqueeze(0) if packed else bool_mask,
        temperatures=None,
        temperature=number,
        softcap=softcap,
        logit_scale=logit_scale,
        support=support,
        shape=token_ids.shape,
        name=name,
    )
    if isinstance(temperature, Tensor):
        inputs = replace(inputs, temperatures=_per_token_temperature(inputs, temperature))
    vocabulary = scored.shape[-1] if vocabulary is None else vocabulary
    if checks.value_checks_wanted(scored):
        _check_values(inputs, vocabulary)
    if support is not None:
        check_support(support, inputs.token_ids, inputs.mask, vocabulary, packed=inputs.packed)
    return inputs


def _check_scored(name: str, x: Tensor, token_ids: Tensor) -> None:
    letter, fix = ("V", "A model's output holds it as .logits.") if name == "logits" else ("D", "It is the input of a model's LM head.")
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a floating-point torch.Tensor. {fix}")
    checks.tensor(name, x, like=None)
    if checks.has_forward_tangent(x) and x.dtype != torch.float64 and select(x.device) != "reference":
        raise NotImplementedError(
            f"{name} has a forward-mode tangent (torch.func.jvp, torch.autograd.forward_ad); expected a tensor without one, since the "
            "kernels have no forward-mode derivative. Use backward(), or gf.use_backend('reference')."
        )
    if x.is_meta and select(x.device) == "reference":  # torch.compile's fake tensors report the device they represent
        are = "are" if name == "logits" else "is"
        raise ValueError(f"{name} {are} on meta, which holds no values; expected tensors on a CPU or a GPU. {fix}")
    checks.tensor("token_ids", token_ids, like=x, like_name=name, floating=False)
    if token_ids.dtype != torch.int64:
        raise TypeError(f"token_ids has dtype {token_ids.dtype}; expected torch.int64. Convert it: token_ids.long().")
    if x.dim() not in (2, 3):
        raise ValueError(f"{name} has shape {list(x.shape)}; expected [B, T, {letter}], [B, T + 1, {letter}] or packed [N, {letter}].")
    if name == "logits" and x.shape[-1] < 2:
        raise ValueError(f"logits has a vocabulary of {x.shape[-1]}; expected at least 2 entries in its last dimension.")
    if x.dim() == 2:
        checks.shape("token_ids", token_ids, ((x.shape[0],), "[N]"), source=f"{name} and token_ids")
        return
    sequences, positions, _ = x.shape
    allowed = [((sequences, positions), f"[B, T] ({name} [B, T, {letter}])")]
    if positions > 0:
        allowed.append(((sequences, positions - 1), f"[B, T] ({name} [B, T + 1, {letter}])"))
    checks.shape("token_ids", token_ids, *allowed, source=f"{name} and token_ids")


def checked_scoring(temperature: float | Tensor, softcap: float | None, logit_scale: float) -> tuple[float, float | None, float]:
    """Validate temperature, soft cap and logit scale, and return them as numbers; 1.0 for a temperature that is a tensor."""
    if softcap is not None:
        softcap = float(checks.float32_positive("softcap", softcap, "Pass None for a model without a soft cap."))
    logit_scale = float(checks.float32_positive("logit_scale", logit_scale, "Pass 1.0 for a model that does not scale its logits."))
    number = 1.0 if isinstance(temperature, Tensor) else checks.float32_positive("temperature", temperature, TEMPERATURE_FIX)
    for name, divisor in (("temperature", number), ("softcap", softcap)):
        if divisor is not None and not checks.SMALLEST_FLOAT32 <= logit_scale / divisor <= checks.LARGEST_FLOAT32:
            raise ValueError(
                f"logit_scale / {name} is {logit_scale:g} / {divisor:g}; expected a quotient that float32 can hold. Choose a {name} nearer "
                "to the logit_scale."
            )
    return number, softcap, logit_scale


def checked_mask(mask: Tensor, tokens: Tensor, name: str, *, scored: str | None = None) -> Tensor:
    """Validate the mask and return it as bool.

    Args:
        tokens: the tensor whose shape and device the mask must have.
        name: of ``tokens``, for messages.
        scored: name of the argument that determines shape and device of ``tokens``; None: ``name``.

    Raises:
        TypeError, ValueError: the mask has another dtype, device or shape, or values other than 0 and 1.
    """
    checks.tensor("mask", mask, like=tokens, like_name=scored or name, floating=False)
    if mask.is_complex():
        raise TypeError(f"mask has dtype {mask.dtype}; expected bool, or numbers 0 and 1.")
    source = name if scored is None else f"{scored} and {name}"
    checks.shape("mask", mask, (tuple(tokens.shape), f"the shape of {name}"), source=source)
    if mask.dtype == torch.bool:
        return mask
    loss_mask = mask != 0
    if checks.value_checks_wanted(mask):
        bad = loss_mask & (mask != 1)  # NaN is neither
        if bool(bad.any()):
            where = checks.first_index(bad)
            raise ValueError(f"mask{where} is {mask[tuple(where)].item()}; expected bool, or numbers 0 and 1. Compare first: mask > 0.")
    return loss_mask


def check_cu_seqlens(cu_seqlens: Tensor, tokens: Tensor, name: str, *, scored: str | None = None) -> None:
    """Validate the boundaries of packed sequences; ``tokens``, ``name``, ``scored`` and the errors are as in ``checked_mask``."""
    if tokens.dim() != 1:
        raise ValueError(
            f"cu_seqlens was given with {name} of shape {list(tokens.shape)}; expected packed input [N]. Drop it for a padded batch."
        )
    checks.tensor("cu_seqlens", cu_seqlens, like=tokens, like_name=scored or name, floating=False)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}; expected torch.int32. Convert it: cu_seqlens.int().")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}; expected [S + 1]: the first position of each sequence, then N.")
    if checks.value_checks_wanted(cu_seqlens):
        total = tokens.shape[0]
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != total or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"cu_seqlens is {cu_seqlens.tolist()}; expected to begin with 0, never to decrease, and to end with N = {total}."
            )


def _per_token_temperature(inputs: TokenInputs, temperature: Tensor) -> Tensor:
    if temperature.dim() > 0:
        return inputs.per_token("temperature", temperature, like_sequences=True, one_column=True)
    checks.tensor("temperature", temperature, like=inputs.scored, like_name=inputs.name)
    return temperature.detach().view(1, 1)


def _check_values(inputs: TokenInputs, vocabulary: int) -> None:
    """Check the values of token ids and temperatures, which takes microseconds on a CPU and synchronises a GPU."""
    check_ids(inputs, vocabulary)
    if inputs.temperatures is not None:
        mask = inputs.mask
        bad = mask & ~((inputs.temperatures > 0) & (inputs.temperatures < float("inf")))
        if bool(bad.any()):
            where = checks.first_index(bad)
            value = inputs.temperatures.expand_as(mask)[tuple(where)].item()
            raise ValueError(
                f"temperature of token {inputs.given_index(where)} is {value}; expected a finite number > 0. {TEMPERATURE_FIX}"
            )


def check_ids(inputs: TokenInputs, vocabulary: int) -> None:
    """Raise ValueError if an unmasked token's id is outside the vocabulary, where values may be read (see value_checks_wanted)."""
    if not checks.value_checks_wanted(inputs.token_ids):
        return
    mask, ids, source = inputs.mask, inputs.token_ids, "logits" if inputs.name == "logits" else "the head"
    if ids.numel() == 0:
        return
    lowest, highest = torch.aminmax(torch.where(mask, ids, 0))
    if lowest.item() < 0 or highest.item() >= vocabulary:
        where = checks.first_index(mask & ((ids < 0) | (ids >= vocabulary)))
        raise ValueError(
            f"token_ids{inputs.given_index(where)} is {ids[tuple(where)].item()}; expected 0 <= id < {vocabulary}, the vocabulary of "
            f"{source}, on every unmasked token. Set the mask to 0 on padding."
        )
