"""From what the caller passes to one form: logits or hidden states [B, T or T + 1, ...], everything else [B, T] or broadcastable to
it. A packed [N] batch is one row.

All checks happen here, before anything is computed or written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_fast import checks

__all__ = ["TokenInputs", "token_inputs"]

ANY_VOCABULARY = 1 << 62  # where other processes hold a part of it, whose size is not known yet
TEMPERATURE_CURE = "The temperature is the one that sampled the tokens; greedy decoding (0) has no policy to train."


@dataclass(frozen=True)
class TokenInputs:
    """Logits, or the hidden states that a head turns into them, and what scores them: checked, in one form."""

    scored: Tensor  # [B, T, V] or [B, T + 1, V]; hidden states: D in place of V
    token_ids: Tensor  # int64 [B, T]
    mask: Tensor  # bool [B, T]
    temperatures: Tensor | None  # float, broadcastable to [B, T]; None: one number for all
    temperature: float
    softcap: float | None
    logit_scale: float
    shape: torch.Size  # of token_ids as given: [B, T] or [N]
    name: str = "logits"  # of ``scored``, for messages

    @property
    def packed(self) -> bool:
        return len(self.shape) == 1

    def optional(self, name: str, x: Tensor | None, *, one_column: bool = False) -> Tensor | None:
        """An argument that may be None, else as per_token."""
        return None if x is None else self.per_token(name, x, like_sequences=False, one_column=one_column)

    def per_token(self, name: str, x: Tensor, *, like_sequences: bool, one_column: bool = False) -> Tensor:
        """A floating-point argument shaped like token_ids as [B, T]; one given per sequence as [B, 1].

        like_sequences: [B] is allowed; one_column: [B, 1] is.
        """
        checks.tensor(name, x, like=self.scored, like_name=self.name)
        x = x.detach() if x.requires_grad else x  # a constant of the loss, on every backend
        if self.packed:
            checks.shape(name, x, (tuple(self.shape), "[N]"), source=self.name)
            return x.unsqueeze(0)
        sequences, length = self.shape
        allowed: list[tuple[tuple[int, ...], str]] = [((sequences, length), "[B, T]")]
        if like_sequences:
            allowed.append(((sequences,), "[B]"))
        if one_column:
            allowed.append(((sequences, 1), "[B, 1]"))
        checks.shape(name, x, *allowed, source=self.name)
        return x.unsqueeze(1) if x.dim() == 1 else x

    def like_given(self, x: Tensor) -> Tensor:
        """A [B, T] result in the shape of the caller's token_ids."""
        return x.squeeze(0) if self.packed else x


def token_inputs(
    scored: Tensor,
    token_ids: Tensor,
    *,
    mask: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    name: str = "logits",
    vocabulary: int | None = None,
) -> TokenInputs:
    """Check logits and what scores them, and bring them into one form.

    name, vocabulary: for hidden states, what to call them and how many logits a head makes of them; None: there are logits.

    Raises:
        TypeError, ValueError: names the argument, what it was, what was expected and the cure.
    """
    _check_scored(name, scored, token_ids)
    if mask is not None:
        _check_mask(name, mask, token_ids)
    if softcap is not None:
        checks.positive("softcap", softcap, "Pass None for a model without a soft cap.")
    checks.positive("logit_scale", logit_scale, "Pass 1.0 for a model that does not scale its logits.")

    packed = token_ids.dim() == 1
    bool_mask = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask if mask.dtype == torch.bool else mask != 0
    inputs = TokenInputs(
        scored=scored.unsqueeze(0) if packed else scored,
        token_ids=token_ids.unsqueeze(0) if packed else token_ids,
        mask=bool_mask.unsqueeze(0) if packed else bool_mask,
        temperatures=None,
        temperature=1.0 if isinstance(temperature, Tensor) else checks.positive("temperature", temperature, TEMPERATURE_CURE),
        softcap=None if softcap is None else float(softcap),
        logit_scale=float(logit_scale),
        shape=token_ids.shape,
        name=name,
    )
    if isinstance(temperature, Tensor):
        inputs = replace(inputs, temperatures=_per_token_temperature(inputs, temperature))
    if checks.value_checks_wanted(scored):
        _check_values(inputs, mask, scored.shape[-1] if vocabulary is None else vocabulary)
    return inputs


def _check_scored(name: str, x: Tensor, token_ids: Tensor) -> None:
    letter, cure = ("V", "A model's output holds it as .logits.") if name == "logits" else ("D", "It is what a model feeds to its head.")
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a floating-point torch.Tensor. {cure}")
    checks.tensor(name, x, like=x, like_name=name)
    checks.tensor("token_ids", token_ids, like=x, like_name=name, floating=False)
    if token_ids.dtype != torch.int64:
        raise TypeError(f"token_ids has dtype {token_ids.dtype}; expected torch.int64. Convert it: token_ids.long().")
    if x.dim() not in (2, 3):
        raise ValueError(f"{name} has shape {list(x.shape)}; expected [B, T, {letter}], [B, T + 1, {letter}] or packed [N, {letter}].")
    if name == "logits" and x.shape[-1] < 2:
        raise ValueError(f"logits has a vocabulary of {x.shape[-1]}; expected at least 2 entries in its last dimension.")
    if x.dim() == 2:
        checks.shape("token_ids", token_ids, ((x.shape[0],), "[N]"), source=name)
        return
    sequences, positions, _ = x.shape
    allowed = [((sequences, positions), f"[B, T] ({name} [B, T, {letter}])")]
    if positions > 0:
        allowed.append(((sequences, positions - 1), f"[B, T] ({name} [B, T + 1, {letter}])"))
    checks.shape("token_ids", token_ids, *allowed, source=name)


def _check_mask(name: str, mask: Tensor, token_ids: Tensor) -> None:
    checks.tensor("mask", mask, like=token_ids, like_name=name, floating=False)
    if mask.is_complex():
        raise TypeError(f"mask has dtype {mask.dtype}; expected bool, or numbers 0 and 1.")
    checks.shape("mask", mask, (tuple(token_ids.shape), "the shape of token_ids"), source=name)


def _per_token_temperature(inputs: TokenInputs, temperature: Tensor) -> Tensor:
    if temperature.dim() > 0:
        return inputs.per_token("temperature", temperature, like_sequences=True, one_column=True)
    checks.tensor("temperature", temperature, like=inputs.scored, like_name=inputs.name)
    return temperature.detach().view(1, 1)


def _check_values(inputs: TokenInputs, given_mask: Tensor | None, vocabulary: int) -> None:
    """The checks that must read values; a few microseconds on the CPU, a synchronisation on a GPU."""
    mask = inputs.mask
    if given_mask is not None and given_mask.dtype != torch.bool:
        bad = (given_mask != 0) & (given_mask != 1)  # NaN is neither
        if bool(bad.any()):
            where = checks.first_index(bad)
            raise ValueError(
                f"mask{where} is {given_mask[tuple(where)].item()}; expected bool, or numbers 0 and 1. Compare first: mask > 0."
            )
    check_ids(inputs, vocabulary)
    if inputs.temperatures is not None:
        bad = mask & ~((inputs.temperatures > 0) & (inputs.temperatures < float("inf")))
        if bool(bad.any()):
            where = checks.first_index(bad)
            value = inputs.temperatures.expand_as(mask)[tuple(where)].item()
            raise ValueError(f"temperature of token {_given(inputs, where)} is {value}; expected a finite number > 0. {TEMPERATURE_CURE}")


def check_ids(inputs: TokenInputs, vocabulary: int) -> None:
    """Every token that counts is in the vocabulary; looked at where values may be read."""
    if not checks.value_checks_wanted(inputs.token_ids):
        return
    mask, ids, of = inputs.mask, inputs.token_ids, "logits" if inputs.name == "logits" else "the head"
    if ids.numel() == 0:
        return
    lowest, highest = torch.aminmax(torch.where(mask, ids, 0))
    if lowest.item() < 0 or highest.item() >= vocabulary:
        where = checks.first_index(mask & ((ids < 0) | (ids >= vocabulary)))
        raise ValueError(
            f"token_ids{_given(inputs, where)} is {ids[tuple(where)].item()}; expected 0 <= id < {vocabulary}, the vocabulary of "
            f"{of}, on every token that counts. Set the mask to 0 on padding."
        )


def _given(inputs: TokenInputs, index: list[int]) -> list[int]:
    return index[1:] if inputs.packed else index
