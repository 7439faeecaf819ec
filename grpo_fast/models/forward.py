"""Forward passes of a micro-batch: its loss, or its log-probabilities, by the fused head where the model has one it can take, else from
the model's logits; packed or padded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import grpo_fast as gf
from grpo_fast.models.lm_head import ModelHead, head_of, hidden_states_of
from grpo_fast.models.packing import FLASH, Packed, attention_of, choose_attention, pack, sees_across, takes_positions
from grpo_fast.models.unwrap import eval_mode, inner_model, is_peft, is_sharded
from grpo_fast.trainer.config import GRPOConfig
from grpo_fast.trainer.rollout import Rollout

__all__ = ["Passes", "load_policy", "without_dropout"]

LEAK = 1e-2  # logits of a packed sequence move by rounding alone, or by tenths if it sees its neighbours

logger = logging.get_logger(__name__)


class Passes:
    """How rows are scored; the same for policy, old policy and reference.

    Args:
        args: the settings ``packing`` and ``fused_head``.
        accelerator: of the trainer, for its device and its autocast.
        pad_token_id: fills what is left of rows.
    """

    def __init__(self, args: GRPOConfig, accelerator: Any, pad_token_id: int) -> None:
        self.args, self.accelerator, self.pad_token_id = args, accelerator, pad_token_id
        self._how: str | None = None  # decided with the first rows
        self._takes_head = args.fused_head

    def loss(self, model: Any, rows: Rollout, **options: Any) -> gf.GRPOOutput:
        """Loss of the rows, with the gradient; ``options`` of gf.grpo_loss."""
        packed = self._pack(model, rows)
        options |= {
            "old_logprobs": rows.tokens.get("old"),
            "ref_logprobs": rows.tokens.get("ref"),
            "rollout_weights": rows.tokens.get("weights"),
            "mask": packed.per_token(rows.loss_mask),
            "temperature": packed.per_token(rows.temperature),
            "cu_seqlens": packed.cu_seqlens,
        }
        advantages = packed.per_token(rows.advantages)
        return self._scored(
            model,
            packed,
            from_hidden=lambda hidden, head: gf.linear_grpo_loss(
                hidden, **head, token_ids=packed.token_ids, advantages=advantages, **options
            ),
            from_logits=lambda logits: gf.grpo_loss(logits, packed.token_ids, advantages, **options),
        )

    @contextmanager
    def whole(self, model: Any) -> Iterator[None]:
        """FSDP2 around PEFT: inside, what belongs to the outermost module is in one piece, for who calls the model within, as `generate`
        does. (Its layers see to themselves.)
        """
        if not hasattr(model, "unshard") or inner_model(model) is model:
            yield
            return
        with torch.no_grad():
            token = torch.full((1, 1), self.pad_token_id, device=self.accelerator.device)
            model(input_ids=token, use_cache=False)  # the first pass tells FSDP2 which module is the outermost
        model.unshard()
        try:
            yield
        finally:
            model.reshard()

    @torch.no_grad()
    def logprobs(self, model: Any, rollout: Rollout, *, at_once: int) -> gf.TokenLogprobs:
        """Log-probabilities and entropies of all tokens, [N], each at its own temperature, without gradient or dropout."""
        found = []
        starts = range(0, len(rollout), at_once)
        idle = max(gather_object([len(starts)])) - len(starts) if is_sharded(model) else 0  # the others wait for us in every forward pass
        with eval_mode(model):
            for start in starts:
                rows = rollout.select(range(start, min(start + at_once, len(rollout))))
                found.append(self._logprobs(model, rows, rows.temperature))
            for _ in range(idle):
                token = [[self.pad_token_id]]
                self._logprobs(model, Rollout(token, token, torch.ones(1), torch.zeros(1), torch.zeros(1).bool()), torch.ones(1))
        empty = torch.zeros(0, device=self.accelerator.device)
        return gf.TokenLogprobs(torch.cat([f.logprobs for f in found] or [empty]), torch.cat([f.entropy for f in found] or [empty]))

    @torch.no_grad()
    def logprobs_at(self, model: Any, rows: Rollout, temperature: Tensor) -> Tensor:  # [B]; [N]
        """What the tokens' log-probabilities would be at other temperatures than their own."""
        with eval_mode(model):
            return self._logprobs(model, rows, temperature).logprobs

    def _logprobs(self, model: Any, rows: Rollout, temperature: Tensor) -> gf.TokenLogprobs:
        packed = self._pack(model, rows)
        per_token = packed.per_token(temperature)
        return self._scored(
            model,
            packed,
            from_hidden=lambda hidden, head: gf.linear_token_logprobs(hidden, **head, token_ids=packed.token_ids, temperature=per_token),
            from_logits=lambda logits: gf.token_logprobs(logits, packed.token_ids, temperature=per_token),
        )

    def _scored(
        self, model: Any, packed: Packed, *, from_hidden: Callable[[Tensor, dict[str, Any]], Any], from_logits: Callable[[Tensor], Any]
    ) -> Any:
        inputs, scored_at = packed.inputs, packed.scored_at
        if "logits_to_keep" in inspect.signature(inner_model(model).forward).parameters:  # nothing of the prompts' is needed
            width = inputs["input_ids"].shape[1]
            columns, index = torch.unique(scored_at % width, return_inverse=True)
            inputs, scored_at = {**inputs, "logits_to_keep": columns}, scored_at // width * columns.shape[0] + index
        with self.accelerator.autocast():
            found = self._hidden_states(model, inputs)
            if found is None:
                return from_logits(model(**inputs).logits.flatten(0, 1)[scored_at])
            hidden, head = found[0].flatten(0, 1)[scored_at], found[1]
            return from_hidden(hidden, head.arguments(hidden))

    def _hidden_states(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, ModelHead] | None:
        """What the head is fed, and the head; None, which is said once, where the loss has to go by the logits."""
        if not self._takes_head:
            return None
        try:
            if hasattr(head_of(model).weight, "ds_id"):
                raise ValueError("DeepSpeed's third stage keeps the head's weight in parts.")
            return hidden_states_of(model, inputs)
        except ValueError as error:
            self._takes_head = False
            logger.warning(f"The loss is computed from logits, which takes more memory: {error}")
            return None

    def _pack(self, model: Any, rows: Rollout) -> Packed:
        device = self.accelerator.device
        if self._how is None:
            self._how = self._choose(model, device)
        return pack(rows, how=self._how, pad_token_id=self.pad_token_id, device=device)

    def _choose(self, model: Any, device: torch.device) -> str:
        inner = inner_model(model)
        if not takes_positions(inner):
            return "padded_without_positions"
        flash = attention_of(inner) in FLASH
        packing: Any = self.args.packing
        if packing is False or (packing == "auto" and not flash):
            return "padded"
        with eval_mode(model), self.accelerator.autocast():
            leak = sees_across(model, self.pad_token_id, device)
        if leak > LEAK:
            message = f"packed sequences see each other with {type(inner).__name__}: logits change by {leak:.2g} with the neighbour"
            if packing is True:
                raise ValueError(f"packing is True, but {message}; expected no change. Cure: packing=False, or packing='auto'.")
            logger.warning(f"{message}. They are padded instead.")
            return "padded"
        return "one_row" if flash else "rows"


def load_policy(model: Any, args: GRPOConfig, tokenizer: Any, peft_config: Any = None, quantization: Any = None) -> tuple[Any, Any]:
    """Model and tokenizer ready to be trained, loaded where they are given by name."""
    if quantization is not None and not isinstance(model, str):
        raise ValueError("quantization_config is given with a model; expected None, or the model's name: it is quantised as it is loaded.")
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(model, **_loading(args, quantization))
    if tokenizer is None:
        if not name:
            raise ValueError("processing_class is None and the model has no name to find its tokenizer by; expected the tokenizer.")
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ValueError("processing_class has no eos_token_id; expected one: a completion ends with it.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if peft_config is not None:
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
    if is_peft(model) and args.gradient_checkpointing:
        model.enable_input_require_grads()
    if args.disable_dropout:
        without_dropout(model)
    return model, tokenizer


def _loading(args: GRPOConfig, quantization: Any) -> dict[str, Any]:
    """The arguments of from_pretrained."""
    given: Any = args.model_init_kwargs or {}
    options: dict[str, Any] = {"trust_remote_code": args.trust_remote_code, "dtype": "float32", **given}
    if quantization is not None:
        options["quantization_config"] = quantization
    if options.get("attn_implementation") in (None, "auto"):
        half = bool(args.bf16 or args.fp16) or options["dtype"] in ("bfloat16", "float16", torch.bfloat16, torch.float16)
        options["attn_implementation"] = choose_attention(half=half)
    return options


def without_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: of modules, and of attention, where transformers keeps it as a number."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
