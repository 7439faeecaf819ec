"""Prompts that are computed once for a group: same log-probabilities, same gradients, and refused where they would not be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate import Accelerator
from decoder_models import VOCABULARY, gpt2, llama, mixtral, qwen3
from transformers import AttentionInterface, PreTrainedModel

import grpo_fast as gf
from grpo_fast.models import group_attention
from grpo_fast.models.batch import ForwardBatch
from grpo_fast.models.forward import ModelForward
from grpo_fast.models.router import make_router_loss
from grpo_fast.models.shared_prompts import PromptSharing, pack_groups, shared_tokens, sharing_error
from grpo_fast.trainer import GRPOConfig

CPU = torch.device("cpu")
ROUNDING = 2e-6  # relative; the models are float64, but normalise and rotate in float32


def make_batch(seed: int = 0) -> ForwardBatch:
    """Groups of 3, 1 and 2 completions of different lengths, not in the order of their prompts."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        found: list[int] = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        return found

    prompts = [ids(9), ids(1), ids(6)]
    prompt_ids = [prompts[index] for index in (0, 2, 0, 1, 2, 0)]
    completion_ids = [ids(length) for length in (4, 1, 7, 3, 5, 2)]
    advantages = torch.tensor([1.0, -0.5, 0.7, 0.3, -1.0, 0.4])
    temperature = torch.tensor([1.0, 0.7, 1.3, 1.0, 0.9, 1.0])
    return ForwardBatch(prompt_ids, completion_ids, temperature, advantages, torch.tensor([True, True, True, False, True, True]))


def forward(share: Any, **options: Any) -> ModelForward:
    return ModelForward(Accelerator(cpu=True), 0, share_prompts=share, **options)


def loss_and_gradients(model: PreTrainedModel, share: Any, **options: Any) -> tuple[gf.GRPOOutput, dict[str, Tensor]]:
    model.zero_grad()
    out = forward(share, **options).loss(model, make_batch(), config=gf.LossConfig(entropy_coef=0.1), num_items=20)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def agree(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert torch.linalg.norm(found - expected) <= tolerance * torch.linalg.norm(expected), (found, expected)


@pytest.fixture
def rows_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each forward pass with shared prompts, of every model."""
    seen: list[int] = []
    original = group_attention._split

    def split(groups: Any, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        seen.append(tensors[0].shape[2])
        return original(groups, *tensors)

    monkeypatch.setattr(group_attention, "_split", split)
    return seen


@pytest.mark.parametrize("fused_head", [True, False])
@pytest.mark.parametrize("make", [llama, qwen3, mixtral, gpt2])
def test_loss_and_gradients_are_those_of_single_sequences(
    make: Callable[..., PreTrainedModel], fused_head: bool, rows_of: list[int]
) -> None:
    # The product of experts exists in float32 at most.
    model, tolerance = (make(), 2e-5) if make is mixtral else (make().double(), ROUNDING)
    expected, gradients = loss_and_gradients(model, False, fused_head=fused_head)
    assert not rows_of
    out, found = loss_and_gradients(model, True, fused_head=fused_head)
    batch = make_batch()
    assert shared_tokens(batch) == 16 + 22 in rows_of
    agree(out.logprobs, expected.logprobs, tolerance)
    assert out.entropy is not None and expected.entropy is not None
    agree(out.entropy, expected.entropy, tolerance)
    agree(out.loss, expected.loss, tolerance)
    assert found.keys() == gradients.keys() and len(found) > 10
    for name, gradient in gradients.items():
        agree(found[name], gradient, tolerance)


def test_scoring_has_the_order_of_the_batch(rows_of: list[int]) -> None:
    """Also where a group is cut, because fewer sequences are scored at once."""
    model, batch = llama().double(), make_batch()
    expected = forward(False).logprobs(model, batch, batch_size=6)
    for size in (6, 4, 3, 1):
        found = forward(True).logprobs(model, batch, batch_size=size)
        agree(found.logprobs, expected.logprobs, ROUNDING)
        agree(found.entropy, expected.entropy, ROUNDING)


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing(reentrant: bool) -> None:
    """The layers are computed again in the backward pass, when the call of the model has long returned."""
    model = llama().double()
    _, expected = loss_and_gradients(model, False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    _, found = loss_and_gradients(model, True)
    for name, gradient in expected.items():
        agree(found[name], gradient, ROUNDING)


def test_with_lora() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama().double(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    _, expected = loss_and_gradients(model, False)
    _, found = loss_and_gradients(model, True)
    assert expected and all("lora" in name for name in expected)
    for name, gradient in expected.items():
        agree(found[name], gradient, ROUNDING)


def test_bfloat16_differs_by_rounding(rows_of: list[int]) -> None:
    exact = forward(False).logprobs(llama().double(), make_batch(), batch_size=6).logprobs
    model = llama().bfloat16()
    errors = [(forward(share).logprobs(model, make_batch(), batch_size=6).logprobs - exact).abs().mean() for share in (False, True)]
    assert rows_of and errors[1] < 2 * errors[0]


def test_auto_shares_where_it_saves_tokens(rows_of: list[int]) -> None:
    model, batch = llama(), make_batch()
    made = forward("auto")
    alone = made.logprobs(model, batch.select([1, 2, 3]), batch_size=3)  # three different prompts
    assert set(rows_of) == {9 + 10}, "the test batch alone"
    together = made.logprobs(model, batch.select([0, 2, 5]), batch_size=3)
    assert 9 + 13 in rows_of and len(alone.logprobs) == 11 and len(together.logprobs) == 13
    rows_of.clear()
    short = ForwardBatch([[1], [1]], [[5] * 8, [6] * 8], torch.ones(2), torch.ones(2), torch.ones(2).bool())
    forward("auto").logprobs(model, short, batch_size=2)
    assert 17 not in rows_of, "one token of eighteen is saved: not worth it"


def test_a_model_that_ignores_the_groups_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one with recurrent layers would: a completion then sees the others."""
    model = llama()
    group_attention.register_attention("sdpa")
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", _ignoring(AttentionInterface._global_mapping["sdpa"]))
    error, largest = sharing_error(model, 0, CPU)
    assert error > 0.1 > largest
    with pytest.raises(ValueError, match=r"share_prompts is True, but logits of LlamaForCausalLM change by .* Fix: share_prompts='auto'"):
        forward(True).logprobs(model, make_batch(), batch_size=6)
    expected = forward(False).logprobs(model, make_batch(), batch_size=6).logprobs
    assert (forward("auto").logprobs(model, make_batch(), batch_size=6).logprobs == expected).all()


def _ignoring(attention: Any) -> Any:
    def without_groups(*args: Any, shared_prompts: object = None, **kwargs: Any) -> Any:
        return attention(*args, **kwargs)

    without_groups.takes_groups = True  # type: ignore[attr-defined]
    return without_groups


def test_other_attention_is_refused() -> None:
    model = llama(attn_implementation="eager")
    with pytest.raises(ValueError, match=r"the attention of LlamaForCausalLM is 'eager', and prompts are shared with sdpa"):
        forward(True).logprobs(model, make_batch(), batch_size=6)
    made = forward("auto")
    made.logprobs(model, make_batch(), batch_size=6)
    # Another model, as the reference, can have another attention than that which was tested; it would ignore the groups.
    sharing = PromptSharing("auto")
    sharing.decide(llama(), 0, CPU)
    assert sharing.pack(llama(), make_batch(), CPU) is not None and sharing.pack(model, make_batch(), CPU) is None


def test_a_window_is_respected(rows_of: list[int]) -> None:
    window = {"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 0}
    model, batch = qwen3(**window).double(), make_batch()
    assert "sliding_attention" in model.config.layer_types
    expected = forward(False).logprobs(model, batch, batch_size=6).logprobs
    agree(forward("auto").logprobs(model, batch, batch_size=6).logprobs, expected, ROUNDING)
    assert 38 not in rows_of, "the longest sequence has 16 tokens"
    short = batch.select([0, 5])
    forward("auto").logprobs(model, short.select([1, 1]), batch_size=2)
    assert 9 + 2 * 2 in rows_of


def test_the_load_balance_of_routers_needs_single_sequences() -> None:
    model = mixtral(router_aux_loss_coef=0.1)
    router_loss = make_router_loss(model, 0.1)
    with pytest.raises(ValueError, match="share_prompts is True, but the load balance of routers"):
        forward(True, router_loss=router_loss)
    assert forward("auto", router_loss=router_loss).pack(model, make_batch()).inputs["input_ids"].shape[0] == 6


def test_the_setting_is_checked() -> None:
    with pytest.raises(ValueError, match="share_prompts is 'yes'"):
        GRPOConfig("out", share_prompts="yes", use_cpu=True, report_to="none")
    assert GRPOConfig("out", share_prompts="false", use_cpu=True, report_to="none").forward_options()["share_prompts"] is False


def segments_in_pytorch(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int = 0,
    max_length_k: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What flash attention computes of segments: causal, with the last query at the last key. [1, H, L, D] to [1, L, H, D]."""
    assert attention_mask is None
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        full = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return full.transpose(1, 2), None
    queries, keys = cu_seq_lens_q.diff().tolist(), cu_seq_lens_k.diff().tolist()
    assert max(queries) == max_length_q and max(keys) == max_length_k
    outputs = []
    for q, k, v in zip(query.split(queries, 2), key.split(keys, 2), value.split(keys, 2), strict=True):
        before = k.shape[2] - q.shape[2]
        allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(before)
        outputs.append(nn.functional.scaled_dot_product_attention(q, k, v, allowed, scale=scaling, enable_gqa=True))
    return torch.cat(outputs, 2).transpose(1, 2), None


def test_flash_attention_gets_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention itself needs a GPU: here is what it is called with, and what it would compute."""
    expected = forward(False).logprobs(llama().double(), make_batch(), batch_size=6).logprobs
    model = llama().double()
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", segments_in_pytorch)
    model.config._attn_implementation = "flash_attention_2"
    made = forward(True, packing=False)
    agree(made.logprobs(model, make_batch(), batch_size=6).logprobs, expected, ROUNDING)
    packed = made.pack(model, make_batch())
    assert packed.inputs["input_ids"].shape == (1, 38)


def test_the_row_worked_by_hand() -> None:
    batch = ForwardBatch([[1, 2], [3], [1, 2]], [[4, 5], [6], [7]], torch.ones(3), torch.zeros(3), torch.tensor([True, True, False]))
    packed = pack_groups(batch, device=CPU)
    assert packed.inputs["input_ids"].tolist() == [[1, 2, 4, 5, 7, 3, 6]]
    assert packed.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert packed.inputs[group_attention.ARGUMENT] == ((2, (2, 1)), (1, (1,)))
    assert packed.token_ids.tolist() == [4, 5, 6, 7] and packed.scored_at.tolist() == [1, 2, 5, 1]
    assert packed.cu_seqlens.tolist() == [0, 2, 3, 4] and packed.router_mask.tolist() == [[True] * 4 + [False] + [True] * 2]
