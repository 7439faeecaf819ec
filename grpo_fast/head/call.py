"""One call of the head's functions: its validated arguments, and the quantities that the computation over chunks derives from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from grpo_fast.head.chunking import ChunkPlan, ChunkSize
from grpo_fast.head.kept import largest_kept_set
from grpo_fast.head.matrix_products import DenseHead, Head, HeadTensors, ModuleHead, NeedsGrad
from grpo_fast.head.precision import Precision
from grpo_fast.head.validation import (
    check_invariance,
    check_logits_dtype,
    check_weight,
    product_dtype,
    validated_bytes,
    validated_module,
    vocabulary_of,
)
from grpo_fast.head.weights import gathered
from grpo_fast.loss.api import by_reference, scoring
from grpo_fast.loss.support import Support
from grpo_fast.loss.token_inputs import ANY_VOCABULARY, TokenInputs, check_ids, token_inputs
from grpo_fast.loss.token_rows import TokenRows
from grpo_fast.loss.vocab_parallel import Shard, all_reduce_min, gather_vocab_shards
from grpo_fast.ops.invariance import is_batch_invariant

__all__ = ["LinearCall", "validated_call"]


class ScoringOptions(TypedDict):
    """How logits are scored, as arguments of grpo_loss and token_logprobs."""

    temperature: float | Tensor
    softcap: float | None
    logit_scale: float
    support: Support | None


class LinearCall(NamedTuple):
    """A validated call of linear_grpo_loss or linear_token_logprobs."""

    tokens: TokenInputs
    tensors: HeadTensors
    module: Callable[[Tensor], Tensor] | None  # in place of the weight
    vocabulary: int
    precision: Precision
    chunk_bytes: int | None
    group: ProcessGroup | None
    temperature: float | Tensor  # as the caller gave it
    autocast: torch.dtype | None  # autocast's dtype at the call; None: autocast was off

    @property
    def row_bytes(self) -> int:
        return self.precision.row_bytes(self.vocabulary, self.tokens.scored.device)

    @property
    def chunks(self) -> ChunkSize:
        """Tokens per chunk, the same for all processes that share the vocabulary."""
        device = self.tokens.scored.device
        rows = self.precision.rows_per_chunk(self.chunk_bytes, self.vocabulary, device)
        return ChunkSize(rows if self.group is None else all_reduce_min(rows, self.group, device), self.precision.tile(device))

    @property
    def module_logits_dtype(self) -> torch.dtype | None:
        return self.precision.logits_dtype if self.precision.logits_dtype == torch.float32 else None

    @property
    def compiled(self) -> bool:
        """Whether torch.compile traces this call, which then becomes one operator."""
        return torch.compiler.is_compiling() and self.module is None and self.group is None

    @property
    def by_reference(self) -> bool:
        assert self.tensors.hidden is not None
        return self.group is None and (self.precision.dtype == torch.float64 or by_reference(self.tensors.hidden))

    @property
    def wants_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self.tensors)

    @property
    def scoring_options(self) -> ScoringOptions:
        return {
            "temperature": self.temperature,
            "softcap": self.tokens.softcap,
            "logit_scale": self.tokens.logit_scale,
            "support": self.tokens.support,
        }

    def rows(self) -> TokenRows:
        """The tokens and the settings that score them, [1, N]."""
        tokens = self.tokens
        temperatures, temperature, softcap, logit_scale = scoring(tokens)
        if temperatures is not None:
            temperatures = temperatures.expand(tokens.token_ids.shape).reshape(1, -1)
        shard: Shard | None = None
        if self.group is not None:
            shard = gather_vocab_shards(self.vocabulary, self.group, tokens.scored.device)
            check_ids(tokens, shard.total)
        rows = TokenRows(
            tokens.token_ids.reshape(1, -1), tokens.mask.reshape(1, -1), temperatures, temperature, softcap, logit_scale, shard
        )
        if tokens.support is None:
            return rows
        vocabulary = self.vocabulary if shard is None else shard.total
        largest = 0 if self.module is not None else largest_kept_set(vocabulary, self.precision.dtype, tokens.scored.device)
        return rows._replace(sets=tokens.support.kept_sets, largest_kept_set=largest)

    def head(self, tensors: HeadTensors, needs_grad: NeedsGrad, plan: ChunkPlan) -> Head:
        """The head for a plan's chunks, from the call's tensors as autograd passes them."""
        length = self.tokens.token_ids.shape[1]
        if self.module is not None:
            assert tensors.hidden is not None
            return ModuleHead(self.module, tensors.hidden, needs_grad, self.vocabulary, length, self.autocast, self.module_logits_dtype)
        return DenseHead(tensors, needs_grad, self.precision, length, plan, group=self.group)

    def full_logits(self) -> Tensor:
        """All logits, recorded by autograd, in the shape of the hidden states as the caller gave them."""
        positions = self.tokens.scored.shape[1]
        unmasked = torch.nn.functional.pad(self.tokens.mask, (0, positions - self.tokens.mask.shape[1])).unsqueeze(-1)

        def select(x: Tensor | None) -> Tensor | None:  # masked hidden states may be NaN, and 0 * NaN would reach the weight's gradient
            return None if x is None else torch.where(unmasked, x, 0)

        tensors = self.tensors._replace(hidden=select(self.tensors.hidden), adapted=select(self.tensors.adapted))
        hidden, weight, bias, adapted, adapter_weight = (
            None if x is None else x.to(self.precision.dtype).to(self.precision.logits_dtype) for x in tensors
        )
        assert hidden is not None
        if self.module is not None:
            assert tensors.hidden is not None
            logits = self.module(tensors.hidden.to(self.precision.dtype))
            logits = logits.to(self.module_logits_dtype or logits.dtype)
        else:
            assert weight is not None
            logits = torch.nn.functional.linear(hidden, weight, bias)
        if adapted is not None and adapter_weight is not None:
            logits = logits + adapted @ adapter_weight.T
        return logits.squeeze(0) if self.tokens.packed else logits


def validated_call(
    hidden: Tensor,
    weight: Tensor | Callable[[Tensor], Tensor],
    token_ids: Tensor,
    *,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    support: Support | None,
    chunk_bytes: int | None,
    adapter: tuple[Tensor, Tensor] | None,
    process_group: ProcessGroup | None,
    logits_dtype: str,
) -> LinearCall:
    """Validate the arguments that linear_grpo_loss and linear_token_logprobs share.

    Raises:
        TypeError, ValueError: names the argument, what it was, what was expected and the fix.
    """
    if not isinstance(hidden, Tensor):
        raise TypeError(
            f"hidden is a {type(hidden).__name__}; expected a floating-point torch.Tensor. It is the input of a model's LM head."
        )
    module: Callable[[Tensor], Tensor] | None = None
    matrix: Tensor | None = None
    if isinstance(weight, Tensor):
        matrix, bias = gathered(weight), None if bias is None else gathered(bias)
        check_weight(hidden, matrix, bias, adapter)
        vocabulary = matrix.shape[0]
    else:
        module = validated_module(weight, bias, adapter, process_group)
        vocabulary = vocabulary_of(module, hidden)
    tokens = token_inputs(
        hidden,
        token_ids,
        mask=mask,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        support=support,
        name="hidden",
        vocabulary=vocabulary if process_group is None else ANY_VOCABULARY,
    )
    check_logits_dtype(logits_dtype)
    chunk_bytes = validated_bytes("chunk_bytes", chunk_bytes, least=1)
    adapted, adapter_weight = (None, None) if adapter is None else adapter
    if adapted is not None and tokens.packed:
        adapted = adapted.unsqueeze(0)
    tensors = HeadTensors(tokens.scored, matrix, bias, adapted, adapter_weight)
    autocast = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
    dtype = product_dtype(hidden, matrix, autocast)
    if process_group is not None and dtype == torch.float64:
        raise ValueError(
            "process_group was given with float64 hidden states or weight; expected float32, bfloat16 or float16: float64 is computed by "
            "the reference, which needs the whole vocabulary. Convert them: hidden.float(), weight.float()."
        )
    precision = Precision.of(dtype, logits_dtype, is_batch_invariant())
    call = LinearCall(tokens, tensors, module, vocabulary, precision, chunk_bytes, process_group, temperature, autocast)
    if precision.batch_invariant:
        check_invariance(module, by_reference=call.by_reference)
    return call
