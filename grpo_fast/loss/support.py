"""Support: for every token the set of vocabulary ids that the sampler could have drawn, after top-k, top-p or min-p."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_fast.loss import checks
from grpo_fast.loss.reported_sets import LARGEST_ID, checked_sets, sets_of_top_logprobs
from grpo_fast.loss.truncation import truncated
from grpo_fast.ops.kept_logprobs import KeptSets

__all__ = ["Support", "check_support"]


@dataclass(frozen=True, eq=False)
class Support:
    """The kept sets of N positions in compressed form: the policy of position n is the softmax over its set only.

    With top-k, top-p or min-p a sampler draws from ``softmax(z / T)`` restricted to a kept set and renormalised. A loss over the whole
    vocabulary would score another policy than the one that sampled; with these sets it scores the same one (as DeepSeek-V3.2 does,
    arXiv:2512.02556).

    Position n keeps ``token_ids[offsets[n] : offsets[n + 1]]``, in any order and without duplicates. An empty set means no restriction: the
    whole vocabulary. For token ids ``[B, T]`` the positions are counted row by row, ``n = b * T + t``.

    Args:
        token_ids: int32 ``[K]``, the vocabulary ids of all sets, one after the other.
        offsets: int64 ``[N + 1]``: 0, then where each set ends; on the same device.

    Raises:
        TypeError: a tensor has another dtype, or is no tensor.
        ValueError: a shape or device is wrong; on the CPU also: the offsets decrease or do not end with K, an id is negative, or a set has
            the same id twice. On a GPU values are checked within ``debug_checks`` only.

    Example:
        >>> support = Support.from_lists([[5, 2, 9], [], [7]])
        >>> support.token_ids, support.offsets
        (tensor([5, 2, 9, 7], dtype=torch.int32), tensor([0, 3, 3, 4]))
    """

    token_ids: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        checks.tensor("support.token_ids", self.token_ids, like=None, floating=False)
        checks.tensor("support.offsets", self.offsets, like=self.token_ids, like_name="support.token_ids", floating=False)
        if self.token_ids.dtype != torch.int32:
            raise TypeError(f"support.token_ids has dtype {self.token_ids.dtype}; expected torch.int32. Convert it: token_ids.int().")
        if self.offsets.dtype != torch.int64:
            raise TypeError(f"support.offsets has dtype {self.offsets.dtype}; expected torch.int64. Convert it: offsets.long().")
        if self.token_ids.dim() != 1 or self.offsets.dim() != 1 or self.offsets.shape[0] < 1:
            raise ValueError(
                f"support has token_ids {list(self.token_ids.shape)} and offsets {list(self.offsets.shape)}; expected [K] and [N + 1]: the "
                "ids of all sets, and 0 followed by the end of each set. Fix: build it with Support.from_lists."
            )
        if checks.value_checks_wanted(self.offsets):
            self._check_values()

    def _check_values(self) -> None:
        offsets, total = self.offsets, self.token_ids.shape[0]
        if offsets[0] != 0 or offsets[-1] != total or bool((offsets.diff() < 0).any()):
            raise ValueError(
                f"support.offsets begin with {int(offsets[0])} and end with {int(offsets[-1])}; expected to begin with 0, never to "
                f"decrease, and to end with K = {total}, the number of token_ids. Fix: build it with Support.from_lists."
            )
        if total == 0:
            return
        if int(self.token_ids.min()) < 0:
            where = checks.first_index(self.token_ids < 0)[0]
            raise ValueError(
                f"support.token_ids[{where}] is {int(self.token_ids[where])}; expected ids >= 0. Fix: leave padding out of the sets."
            )
        key = self.positions() << 31 | self.token_ids
        key = key.sort().values
        twice = key[1:] == key[:-1]
        if bool(twice.any()):
            where = int(key[checks.first_index(twice)[0]])
            raise ValueError(
                f"the set of position {where >> 31} in support holds id {where & LARGEST_ID} twice; expected each id once, since both "
                "would be counted in the sum of probabilities. Fix: remove duplicates, for example with torch.unique."
            )

    # Constructors -----------------------------------------------------------------------------------------------------------

    @classmethod
    def from_lists(cls, sets: Iterable[Sequence[int] | None], *, device: torch.device | str | None = None) -> Support:
        """Build it from one list of ids per position, as vLLM returns them (``sampling_mask``); None or an empty list: no restriction.

        Raises:
            TypeError: an id is not an integer.
            ValueError: an id is outside of int32 or negative, or a set has duplicates.

        Example:
            >>> len(Support.from_lists([[1, 2], None]))
            2
        """
        lists = [[] if ids is None else list(ids) for ids in sets]
        for n, ids in enumerate(lists):
            for x in ids:
                if isinstance(x, bool) or not isinstance(x, int):
                    raise TypeError(f"the set of position {n} holds {x!r} ({type(x).__name__}); expected integer token ids.")
                if not 0 <= x <= LARGEST_ID:
                    raise ValueError(f"the set of position {n} holds id {x}; expected 0 <= id <= {LARGEST_ID}.")
        support = cls(*_compressed(lists))
        return support if device is None else support.to(device)

    @classmethod
    def from_sampling_mask(
        cls, sampling_mask: Sequence[Sequence[int]], token_ids: Sequence[int], *, vocab_size: int | None = None
    ) -> Support:
        """Build it from the lists of ids in a server's reply: ``sampling_mask`` of vLLM, ``output_token_sampling_mask`` of SGLang.

        Unlike in `from_lists`, an empty list is an error, and a list of the whole vocabulary means no restriction.

        Args:
            sampling_mask: one list of ids for each sampled token.
            token_ids: the sampled tokens.
            vocab_size: size of the vocabulary; None = unknown, so that too large ids are found by the loss only.

        Raises:
            TypeError: something is no list, or an id is no integer.
            ValueError: another number of lists than of tokens; a list is empty, has an id twice or one out of range, or lacks the sampled
                token.

        Example:
            >>> Support.from_sampling_mask([[1, 2], [0, 1, 2]], [2, 0], vocab_size=3).sizes
            tensor([2, 0])
        """
        return cls._of(*_compressed(checked_sets(sampling_mask, token_ids, vocab_size)))

    @classmethod
    def from_top_logprobs(
        cls, top_logprobs: Sequence[Mapping[int, float]], token_ids: Sequence[int], *, requested: int, vocab_size: int | None = None
    ) -> Support:
        """Build it from the largest log-probabilities in a server's reply, if they are computed after truncation.

        vLLM does so with ``--logprobs-mode processed_logprobs``: tokens outside of the set have -inf. Only sets that are proved to be
        complete are accepted: a position has at least one -inf, or fewer finite log-probabilities than were requested. So request at least
        ``top_k + 1``.

        Args:
            top_logprobs: for each sampled token the largest log-probabilities by token id; -inf may be written as -9999, as vLLM does.
            token_ids: the sampled tokens.
            requested: how many log-probabilities were requested for each token.
            vocab_size: size of the vocabulary; None = unknown.

        Raises:
            TypeError: an entry is no mapping from integers to numbers.
            IncompleteSetError: a set may have more ids than were reported (a ValueError).
            ValueError: as for `from_sampling_mask`; or a number is NaN or above 0, or the probabilities of a set do not sum to 1.

        Example:
            >>> half = -0.6931472
            >>> Support.from_top_logprobs([{5: half, 2: half, 7: float("-inf")}], [2], requested=3).token_ids
            tensor([5, 2], dtype=torch.int32)
        """
        sets = sets_of_top_logprobs(top_logprobs, requested, vocab_size)
        return cls._of(*_compressed(checked_sets(sets, token_ids, vocab_size, name="top_logprobs")))

    @classmethod
    def from_mask(cls, kept: Tensor) -> Support:
        """Build it from a mask of the vocabulary per position.

        Args:
            kept: bool ``[..., V]``; the positions are counted in order of the leading dimensions. A row of only True or only False means no
                restriction.

        Raises:
            TypeError: ``kept`` is not a bool tensor.
            ValueError: it has no dimension.
        """
        checks.tensor("kept", kept, like=None, floating=False)
        if kept.dtype != torch.bool:
            raise TypeError(f"kept has dtype {kept.dtype}; expected torch.bool. Compare first, for example: scores > -inf.")
        if kept.dim() < 1:
            raise ValueError("kept has no dimension; expected [..., V].")
        rows = kept.flatten(0, -2) if kept.dim() > 1 else kept.unsqueeze(0)
        rows = rows & ~rows.all(-1, keepdim=True)
        return cls._of(rows.nonzero()[:, 1].int(), _offsets(rows.sum(-1)))

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,
        *,
        temperature: float | Tensor = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        order: str = "transformers",
    ) -> Support:
        """Build it from logits, by the rules by which samplers truncate.

        - top_k keeps the k largest logits, and with ties at the k-th all tokens that are equal to it.
        - top_p keeps the smallest set of most probable tokens whose probabilities sum to more than ``top_p`` (arXiv:1904.09751):
          sorted by increasing probability, a token is dropped while the cumulative sum is at most ``1 - top_p``. Of equal tokens at the cut
          those with the larger ids are kept. At least one token is kept.
        - min_p keeps the tokens whose probability is at least ``min_p`` times the largest (arXiv:2407.01082).

        Each rule sees the renormalised distribution that the one before left. transformers applies them as top_k, top_p, min_p; vLLM as
        min_p, top_k, top_p. A sampler on another device or in another precision may round a token at the edge of a set to the other side:
        where a sampler returns its sets, use those.

        Args:
            logits: floating point ``[..., V]``, after soft cap and scale.
            temperature: number, or a tensor of the leading dimensions; the distribution is ``softmax(logits / temperature)``.
            top_k: at least 1; None = off.
            top_p: in (0, 1]; None or 1 = off.
            min_p: in [0, 1]; None or 0 = off.
            order: ``"transformers"`` or ``"vllm"``.

        Returns:
            Support of all leading positions; without any restriction for rows of which nothing is dropped.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, or outside of its range.
        """
        kept = truncated(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, order=order)
        parts = [cls.from_mask(rows) for rows in kept]
        return cls.concatenate(parts) if parts else cls.unrestricted(0, device=logits.device)

    @classmethod
    def unrestricted(cls, positions: int, *, device: torch.device | str | None = None) -> Support:
        """Build it for N positions without any restriction."""
        return cls._of(torch.zeros(0, dtype=torch.int32, device=device), torch.zeros(positions + 1, dtype=torch.int64, device=device))

    @classmethod
    def concatenate(cls, parts: Sequence[Support]) -> Support:
        """Return the sets of several supports, one after the other.

        Raises:
            ValueError: there are no parts.
        """
        if not parts:
            raise ValueError("parts is empty; expected at least one Support. Fix: Support.unrestricted(0).")
        return cls._of(torch.cat([x.token_ids for x in parts]), _offsets(torch.cat([x.sizes for x in parts])))

    @classmethod
    def _of(cls, token_ids: Tensor, offsets: Tensor) -> Support:
        """Build it from tensors that are known to be right, without the checks, whose sorting takes longer than a loss over small sets."""
        support = object.__new__(cls)
        object.__setattr__(support, "token_ids", token_ids)
        object.__setattr__(support, "offsets", offsets)
        return support

    # What it holds ----------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the number of positions N."""
        return self.offsets.shape[0] - 1

    @property
    def kept_sets(self) -> KeptSets:
        """The two tensors as the operators take them."""
        return KeptSets(self.token_ids, self.offsets)

    @property
    def sizes(self) -> Tensor:
        """The number of ids of each set, int64 ``[N]``; 0 = no restriction."""
        return self.offsets.diff()

    def positions(self) -> Tensor:
        """Return the position that each id belongs to, int64 ``[K]``."""
        return torch.repeat_interleave(self.sizes, output_size=self.token_ids.shape[0])

    def take(self, index: Tensor) -> Support:
        """Return the sets of some positions.

        Args:
            index: int64 ``[n]``, positions in any order, or bool ``[N]``.
        """
        if index.dtype == torch.bool:
            index = index.nonzero().squeeze(1)
        return Support._of(*self.kept_sets.take(index))

    def to(self, device: torch.device | str) -> Support:
        """Return it on another device; itself if it is there already."""
        if self.token_ids.device == torch.device(device):
            return self
        return Support._of(self.token_ids.to(device), self.offsets.to(device))

    def dense(self, vocabulary: int) -> Tensor:
        """Return the mask of kept tokens, bool ``[N, V]``, for inspection and small tests; rows without restriction are True."""
        mask = (self.sizes == 0).unsqueeze(1).repeat(1, vocabulary)
        mask[self.positions(), self.token_ids.long()] = True
        return mask


def _offsets(sizes: Tensor) -> Tensor:
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))


def _compressed(lists: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return ids and offsets of lists that have been checked."""
    sizes = torch.tensor([len(ids) for ids in lists], dtype=torch.int64)
    return torch.tensor([x for ids in lists for x in ids], dtype=torch.int32), _offsets(sizes)


def check_support(support: object, token_ids: Tensor, mask: Tensor, vocabulary: int, *, packed: bool) -> None:
    """Validate the sets of a call against its token ids, ``[B, T]``.

    Args:
        vocabulary: the number of ids, at most which the sets may hold.
        packed: whether the caller passed ``[N]``, for messages.

    Raises:
        TypeError: it is no Support.
        ValueError: it has another number of positions, is on another device, or (where values may be read) holds an id outside of the
            vocabulary, or not the sampled token of an unmasked position.
    """
    if not isinstance(support, Support):
        raise TypeError(f"support is a {type(support).__name__}; expected a grpo_fast.Support. Fix: Support.from_lists(sets).")
    if len(support) != token_ids.numel():
        shape = f"[N] = [{token_ids.numel()}]" if packed else f"[B, T] = {list(token_ids.shape)}"
        raise ValueError(
            f"support has {len(support)} positions; expected {token_ids.numel()}, one for each of token_ids {shape}, row by row. Fix: give "
            "padding an empty set."
        )
    if support.offsets.device != token_ids.device:
        raise ValueError(
            f"support is on {support.offsets.device}, token_ids are on {token_ids.device}; expected one device. Fix: support.to(device)."
        )
    if not checks.value_checks_wanted(token_ids) or support.token_ids.numel() == 0:
        return
    largest = int(support.token_ids.max())
    if largest >= vocabulary:
        raise ValueError(
            f"support holds the id {largest}; expected ids below {vocabulary}, the size of the vocabulary. Fix: take the sets from the "
            "sampler of this model."
        )
    sizes = support.sizes
    is_target = support.token_ids == torch.repeat_interleave(token_ids.flatten(), sizes)
    found = torch.zeros_like(sizes).index_add_(0, support.positions(), is_target.long())
    bad = mask.flatten() & (sizes > 0) & (found == 0)
    if bool(bad.any()):
        n = checks.first_index(bad)[0]
        where = [n] if packed else [n // token_ids.shape[1], n % token_ids.shape[1]]
        raise ValueError(
            f"token_ids{where} is {int(token_ids.flatten()[n])}, which is not among the {int(sizes[n])} ids of its set in support; "
            "expected the sampled token in its set. Fix: pass the sets that the sampler returned, without a shift, or an empty set for a "
            "token that was not sampled, with the mask 0."
        )
