"""The head of transformers' models: each against grpo_loss on the model's own logits, loss and gradients of all its parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from compare import labelled
from torch import Tensor, nn

import grpo_fast as gf

B, P, T, V = 3, 4, 5, 60
SMALL = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Each with what its family does to the logits, in a strength that shows.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "Qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "Qwen3": ("Qwen3", {}),
    "Llama": ("Llama", {}),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Gemma2": ("Gemma2", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
    "Gemma3": ("Gemma3Text", {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "Granite": ("Granite", {"logits_scaling": 3.0}),
    "Cohere": ("Cohere", {"logit_scale": 0.4}),
    "Cohere2": ("Cohere2", {"logit_scale": 0.4}),
    "GPT2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}),
    "Qwen3-MoE": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 12}),
    "gpt-oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 4}),
    "Phi-3": ("Phi3", {}),
    "OLMo 2": ("Olmo2", {}),
    "GLM-4": ("Glm4", {}),
    "SmolLM3": ("SmolLM3", {}),
    "Nemotron": ("Nemotron", {}),
    "Granite MoE": ("GraniteMoe", {"logits_scaling": 3.0, "num_local_experts": 4, "num_experts_per_tok": 4}),
    "HyperCLOVA X": ("HyperCLOVAX", {"logits_scaling": 0.4}),
    "MPT": ("Mpt", {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "logit_scale": 0.4}),
    "MiniCPM3": (
        "MiniCPM3",
        {
            "num_key_value_heads": 2,
            "dim_model_base": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "NanoChat": ("NanoChat", {"final_logit_softcapping": 2.0}),
    "RecurrentGemma": ("RecurrentGemma", {"logits_soft_cap": 2.0, "lru_width": 16, "block_types": ["recurrent", "attention"]}),
    "RoBERTa": ("Roberta", {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
}


def tiny(name: str, **extra: Any) -> Any:
    """A model with weights that make its logits differ, in training mode without dropout."""
    family, settings = FAMILIES[name]
    common = SMALL if family != "GPT2" else {"vocab_size": V, "bos_token_id": 1, "eos_token_id": 2}
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    config = getattr(transformers, f"{family}Config")(**{**common, **settings, **extra})
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1) + ("norm" in name and parameter.dim() == 1))
    return model.train()


def batch(padded: bool = True) -> dict[str, Any]:
    """Completions of prompts with padding on the left, the last tokens of some masked."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, V, (B, P + T), generator=generator)
    attention, mask = torch.ones(B, P + T, dtype=torch.int64), torch.ones(B, T, dtype=torch.bool)
    if padded:
        ids[1, :3], attention[1, :3] = 0, 0
        mask[2, 3:] = False
    return {"inputs": {"input_ids": ids, "attention_mask": attention}, "mask": mask, "advantages": torch.tensor([1.0, -0.8, 0.5])}


def own_logits(model: Any, inputs: dict[str, Tensor], length: int = T) -> Tensor:
    """Of the last tokens and the position before, by the model's own forward; positions by the attention mask."""
    if not hasattr(model, "roberta"):  # which passes over padding by itself
        inputs = {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    return model(**inputs).logits[:, -length - 1 :]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def check(model: Any, reference: Any = None, **options: Any) -> dict[str, Tensor]:
    """linear_loss_from(model) is grpo_loss of its logits; reference: another model that computes the same."""
    b = batch()
    ids = b["inputs"]["input_ids"][:, -T:]
    reference = model if reference is None else reference
    config = gf.LossConfig(entropy_coef=0.1)
    common: dict[str, Any] = {"mask": b["mask"], "config": config, "temperature": 0.8}
    logits = own_logits(reference, b["inputs"])
    expected = gf.grpo_loss(logits, ids, b["advantages"], **common)
    if reference is model:
        expected.loss.backward()
    true_gradients = gradients(reference)
    out = gf.linear_loss_from(model, b["inputs"], ids, b["advantages"], **common, **options)
    out.loss.backward()
    found = gradients(model)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)
    if reference is model:
        assert found.keys() == true_gradients.keys()
        largest = max(x.abs().max() for x in true_gradients.values())
        for name, x in found.items():
            torch.testing.assert_close(x, true_gradients[name], rtol=1e-4, atol=1e-5 * largest.item(), msg=labelled(name))
    lp = gf.linear_logprobs_from(model, b["inputs"], ids, mask=b["mask"], temperature=0.8)
    torch.testing.assert_close(lp.logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)
    assert expected.logprobs.std() > 0.1, "the test's model has no signal"
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family(name: str) -> None:
    model = tiny(name)
    forward = dict(vars(model.get_output_embeddings()))
    found = check(model)
    assert len(found) == len(list(model.parameters()))
    assert vars(model.get_output_embeddings()).keys() == forward.keys()  # the module is unchanged


def test_logit_transforms_of_model_families_are_recognised() -> None:
    """The settings above matter: without them the logits would be others."""
    assert gf.head_of(tiny("Gemma2")).softcap == 3.0 and gf.head_of(tiny("Gemma3")).softcap == 2.0
    assert gf.head_of(tiny("Granite")).logit_scale == pytest.approx(1 / 3) and gf.head_of(tiny("Cohere")).logit_scale == 0.4
    head = gf.head_of(tiny("Qwen2 tied"))
    assert head.weight is tiny_embedding(head) and head.bias is None and head.adapters == ()


def tiny_embedding(head: Any) -> Tensor:
    return head.module.weight


def test_a_head_with_a_bias() -> None:
    model = tiny("Llama")
    model.lm_head = nn.Linear(16, V)
    nn.init.normal_(model.lm_head.bias)
    assert "lm_head.bias" in check(model)


def test_bfloat16() -> None:
    model = tiny("Qwen3").bfloat16()
    b = batch()
    ids = b["inputs"]["input_ids"][:, -T:]
    expected = gf.token_logprobs(own_logits(model, b["inputs"]), ids)
    found = gf.linear_logprobs_from(model, b["inputs"], ids, logits_dtype="input")
    assert torch.equal(found.logprobs, expected.logprobs)  # the same product of the same library
    exact = gf.linear_logprobs_from(model, b["inputs"], ids)  # float32 logits, where the model rounds its own to bfloat16
    assert 0 < (exact.logprobs - expected.logprobs).abs().max() < 0.02


def test_packed_inputs() -> None:
    """Two sequences in one row, kept apart by their positions: as if each were alone."""
    model = tiny("Qwen3")
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randint(3, V, (6,), generator=generator), torch.randint(3, V, (9,), generator=generator)
    ids = torch.cat([a, b])
    targets, mask = torch.cat([a.roll(-1), b.roll(-1)]), torch.ones(15, dtype=torch.bool)
    mask[[0, 5, 6, 14]] = False
    positions = torch.cat([torch.arange(6), torch.arange(9)])
    cu = torch.tensor([0, 6, 15], dtype=torch.int32)
    advantages = torch.cat([torch.full((6,), 1.0), torch.full((9,), -0.5)])
    config = gf.LossConfig(loss_type="grpo")
    out = gf.linear_loss_from(
        model, {"input_ids": ids[None], "position_ids": positions[None]}, targets, advantages, mask=mask, cu_seqlens=cu, config=config
    )
    out.loss.backward()
    found = gradients(model)
    total = torch.zeros(())
    for row, advantage, begin, end in ((a, 1.0, 0, 6), (b, -0.5, 6, 15)):
        alone = gf.grpo_loss(
            model(row[None]).logits, row.roll(-1)[None], torch.tensor([advantage]), mask=mask[None, begin:end], config=config
        )
        torch.testing.assert_close(out.logprobs[begin:end], alone.logprobs[0], rtol=1e-4, atol=1e-5)
        total = total + alone.loss / 2
    total.backward()
    torch.testing.assert_close(out.loss, total, rtol=1e-5, atol=1e-6)
    for name, x in gradients(model).items():
        torch.testing.assert_close(found[name], x, rtol=1e-3, atol=1e-6)


# ---- quantised


class Int8(Tensor):
    """A weight as torchao makes them: says that it is float32 and holds whole numbers and a scale, which only F.linear knows to use."""

    @staticmethod
    def __new__(cls, whole: Tensor, scale: Tensor) -> Int8:
        return Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scale.dtype)

    def __init__(self, whole: Tensor, scale: Tensor):
        self.whole, self.scale = whole, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["whole", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Int8:
        return Int8(inner["whole"], inner["scale"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, *rest = args
            return nn.functional.linear(x, weight.whole.float() * weight.scale, *rest)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return Int8(args[0].whole, args[0].scale)
        raise NotImplementedError(f"{func} of a quantised weight")


def test_a_quantised_weight_that_looks_like_a_plain_tensor() -> None:
    model = tiny("Qwen2")
    scale = model.lm_head.weight.detach().abs().max() / 127
    weight = Int8((model.lm_head.weight.detach() / scale).round().to(torch.int8), scale)
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    assert isinstance(model.lm_head.weight, Int8) and gf.head_of(model).weight is model.lm_head
    check(model)
    head: Any = model.lm_head
    with pytest.raises(TypeError, match=r"weight is a Int8 \(quantised\); expected a plain tensor. Pass the frozen head itself"):
        gf.linear_grpo_loss(torch.randn(1, 2, 16), head.weight, torch.zeros(1, 2, dtype=torch.int64), torch.ones(1))


# ---- PEFT


def with_lora(dropout: float = 0.0, **settings: Any) -> Any:
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, **{"target_modules": ["lm_head", "q_proj"], **settings})
    model = peft.get_peft_model(tiny("Qwen2"), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p) * 0.3)
    return model.train()


def test_lora_on_the_head() -> None:
    model = with_lora()
    found = check(model)
    assert {name.split(".")[-3] for name in found if "lm_head" in name} == {"lora_A", "lora_B"} and all(
        x.abs().max() > 0 for x in found.values()
    )
    merged = with_lora().merge_and_unload()  # the same weights by the same seed
    check(model, merged)
    with model.disable_adapter():
        assert gf.head_of(model).adapters == ()
        check_values(model)


def test_two_adapters_and_their_dropout() -> None:
    model = with_lora(dropout=0.5)
    b = batch()
    ids = b["inputs"]["input_ids"][:, -T:]
    first, second = (gf.linear_logprobs_from(model, b["inputs"], ids).logprobs for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    check_values(model)
    model.add_adapter("other", model.peft_config["default"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "other" in name:
                p.copy_(torch.randn_like(p) * 0.3)
    model.base_model.set_adapter(["default", "other"])
    model.eval()  # the dropout of the new one too
    assert len(gf.head_of(model).adapters) == 2
    check_values(model)


def check_values(model: Any) -> None:
    b = batch()
    ids = b["inputs"]["input_ids"][:, -T:]
    expected = gf.token_logprobs(own_logits(model, b["inputs"]), ids)
    torch.testing.assert_close(gf.linear_logprobs_from(model, b["inputs"], ids).logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_trained_whole_beside_lora() -> None:
    model = with_lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    found = check(model)
    assert any("modules_to_save" in name for name in found) and not any("original_module" in name for name in found)
    with model.disable_adapter():
        check_values(model)


def test_dora_on_the_head_is_refused() -> None:
    model = with_lora(use_dora=True)
    with pytest.raises(ValueError, match="DoRA or another variant of LoRA; expected plain LoRA"):
        gf.head_of(model)


# ---- what is not known is refused


def attempt(model: Any) -> Any:
    b = batch()
    return gf.linear_loss_from(model, b["inputs"], b["inputs"]["input_ids"][:, -T:], b["advantages"])


class Doubled(transformers.Qwen3ForCausalLM):
    """Changes its logits in a way that its configuration does not show."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out


class Suppressing(transformers.Qwen3ForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = torch.cat([out.logits[..., :-1], torch.full_like(out.logits[..., :1], float("-inf"))], -1)
        return out


class Normalising(nn.Linear):
    """A head that is not the product with its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.normalize(x, dim=-1) * 3)


class Capped(transformers.Qwen3ForCausalLM):
    """A model that names its soft cap differently."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = 30 * torch.tanh(out.logits / 30)
        return out


class Longer(transformers.Qwen3ForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = nn.functional.pad(out.logits, (0, 4))
        return out


class Twice(transformers.Qwen3ForCausalLM):
    """Has a second use for its head, as models that predict several tokens do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        self.lm_head(torch.zeros(1, 1, 16))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_soft_cap_that_small_logits_do_not_show_is_refused(dtype: torch.dtype) -> None:
    """A model at the beginning of its training has logits of which the cap changes less than rounding does."""
    model = tiny("Qwen3").to(dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.01)
    before = gf.linear_logprobs_from(model, batch()["inputs"], batch()["inputs"]["input_ids"][:, -T:])
    assert before.logprobs.std() < 0.1
    capped = tiny("Qwen3").to(dtype)
    capped.load_state_dict(model.state_dict())
    capped.__class__ = Capped
    with pytest.raises(ValueError, match=r"are not f\(.*: with softcap=None and logit_scale=1 its head's -?1000 should become"):
        attempt(capped)


@pytest.mark.parametrize("kind", [Longer, Twice])
def test_a_head_that_is_used_otherwise_is_refused(kind: type) -> None:
    model = tiny("Qwen3")
    model.__class__ = kind
    with pytest.raises(ValueError, match=r"of its head it made \[3, 1, 64\]|called its output embeddings 2 times; expected one call"):
        attempt(model)


@pytest.mark.parametrize("kind", [Doubled, Suppressing, Normalising])
def test_an_unknown_head_is_refused(kind: type) -> None:
    model = tiny("Qwen3")
    if kind is Normalising:
        weight = model.lm_head.weight
        model.lm_head = Normalising(16, V, bias=False)
        model.lm_head.weight = weight
    else:
        model.__class__ = kind
    for _ in range(2):  # the second time too
        with pytest.raises(ValueError, match=r"logits of .* are not f\(hidden @ weight.T \+ bias\).*grpo_loss"):
            attempt(model)
    assert "forward" not in vars(model.lm_head)


def test_models_without_a_head() -> None:
    with pytest.raises(ValueError, match="Qwen3Model without output embeddings; expected a causal language model"):
        gf.head_of(tiny("Qwen3").model)
    with pytest.raises(ValueError, match="without output embeddings"):
        gf.head_of(nn.Linear(3, 4))


def test_a_forward_that_somebody_has_put_on_the_head_stays() -> None:
    """accelerate's hooks replace a module's forward by one of the instance."""
    model = tiny("Qwen3")
    calls = []
    original = model.lm_head.forward

    def hooked(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return original(x)

    model.lm_head.forward = hooked
    attempt(model)
    assert model.lm_head.forward is hooked and calls
    check(model)


def test_bad_calls() -> None:
    model, b = tiny("Qwen3"), batch()
    ids = b["inputs"]["input_ids"]
    for name in ("softcap", "logit_scale", "bias", "adapter"):
        with pytest.raises(ValueError, match=f"^{name} was given; expected it to be left out"):
            gf.linear_loss_from(model, b["inputs"], ids[:, -T:], b["advantages"], **{name: None})
    with pytest.raises(ValueError, match="token_ids has 9 tokens a row and input_ids 9; expected at least one more"):
        gf.linear_loss_from(model, b["inputs"], ids, b["advantages"])
    with pytest.raises(ValueError, match=r"token_ids has shape \[9\] .* expected packed"):
        gf.linear_loss_from(model, b["inputs"], ids[0], b["advantages"])
    last = ids[:, -T:]
    wrong: list[tuple[Any, Any, type[Exception], str]] = [
        (b["inputs"], ids.tolist(), TypeError, "token_ids is a list; expected a torch.Tensor"),
        (b["inputs"], ids[0, 0], ValueError, r"token_ids has shape \[\]; expected \[B, T\], or \[L\] with packed"),
        (ids, last, TypeError, "model_inputs is a Tensor; expected a dict of what the model is called with"),
        ({**b["inputs"], "labels": ids}, last, ValueError, "model_inputs has labels; expected none"),
    ]
    for inputs, token_ids, error, message in wrong:
        with pytest.raises(error, match=message):
            gf.linear_loss_from(model, inputs, token_ids, b["advantages"])
        with pytest.raises(error, match=message):
            gf.linear_logprobs_from(model, inputs, token_ids)
    encoding = transformers.BatchEncoding(dict(b["inputs"]))  # a mapping, and no dict
    assert torch.equal(gf.linear_logprobs_from(model, encoding, last).logprobs, gf.linear_logprobs_from(model, b["inputs"], last).logprobs)
