"""A fault in what the fast paths run is visible in a comparison with the specification.

The specification (grpo_fast/loss/reference.py) has formulas of its own. Each test puts one fault into the code that the fast paths run, and
the comparison that passes without the fault must fail with it. If both sides shared the code, the fault would be on both and pass.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_fast as gf
from grpo_fast.loss import aggregation, importance, inputs, logprob_loss, operator_arguments, reference, validation
from grpo_fast.loss.inputs import LossInputs
from grpo_fast.loss.sequences import Sequences
from grpo_fast.ops import extension

pytestmark = pytest.mark.skipif(not extension.load(), reason=f"the extension is not loaded: {extension.status().why}")

BATCH, LENGTH, VOCABULARY, HIDDEN = 4, 6, 17, 8


@dataclass(frozen=True)
class Call:
    """A call of a public function, and of the specification with the same arguments."""

    config: gf.LossConfig
    linear: bool = False
    packed: bool = False
    on_policy: bool = False
    per_token: bool = False  # advantages and rollout weights per token
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return std * torch.randn(*shape, generator=generator)

        lengths = torch.tensor([6, 2, 4, 0])
        given: dict[str, Any] = {
            "hidden": normal(BATCH, LENGTH, HIDDEN),
            "token_ids": torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator),
            "advantages": torch.tensor([1.3, -0.8, 0.6, 2.0]),
            "mask": torch.arange(LENGTH) < lengths.unsqueeze(1),
            "old_logprobs": None,
            "ref_logprobs": normal(BATCH, LENGTH, std=0.5) - 3,
            "rollout_weights": torch.tensor([[1.5], [0.6], [1.2], [0.9]]),
        }
        noise = normal(BATCH, LENGTH, std=0.3) + torch.tensor([[0.1], [-0.1], [0.05], [0.0]])
        if not self.on_policy:
            logits = given["hidden"] @ self.weight().T
            given["old_logprobs"] = gf.token_logprobs(logits, given["token_ids"], temperature=0.7).logprobs + noise
        if self.per_token:
            given["advantages"] = given["advantages"].unsqueeze(1) + normal(BATCH, LENGTH, std=0.3)
            given["advantages"][:, 1::2] = 0.0
            given["advantages"][2] *= self.options.get("metrics_on") != "active"  # a sequence without any advantage
            given["rollout_weights"] = given["rollout_weights"] * normal(BATCH, LENGTH, std=0.2).exp()
        if self.packed:
            kept = given["mask"].clone()
            kept[1] = True  # a packed sequence with masked tokens
            for name, x in given.items():
                if isinstance(x, Tensor):
                    x = x.unsqueeze(1) if x.dim() == 1 else x
                    given[name] = x[kept] if x.dim() == 3 else x.expand(BATCH, LENGTH)[kept]
            given["cu_seqlens"] = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).int()
        return {**given, "temperature": 0.7, **self.options}

    @staticmethod
    def weight() -> Tensor:
        return torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(1))

    def compare(self) -> None:
        """The fast path in float32 against the specification in float64.

        Raises:
            AssertionError: they differ.
        """
        given = self.arguments()
        hidden, exact = given.pop("hidden").requires_grad_(), self.weight().double()
        if self.linear:  # chunks of three tokens
            out = gf.linear_grpo_loss(hidden, self.weight(), config=self.config, chunk_bytes=3 * 4 * VOCABULARY, **given)
        else:
            out = gf.grpo_loss(hidden @ self.weight().T, config=self.config, **given)
        (gradient,) = torch.autograd.grad(out.loss, hidden)

        leaf = hidden.detach().double().requires_grad_()
        metrics_on = given.pop("metrics_on", "active" if self.linear else "all")
        token_ids, advantages = given.pop("token_ids"), given.pop("advantages")
        truth = reference.grpo_loss(leaf @ exact.T, token_ids, advantages, self.config, metrics_on=metrics_on, **given)
        (true_gradient,) = torch.autograd.grad(truth.loss, leaf)

        assert true_gradient.abs().max() > 1e-3, "the inputs carry no signal"
        assert torch.equal(out.active, truth.active)
        for actual, expected in ((out.logprobs, truth.logprobs), (out.entropy, truth.entropy), (out.loss, truth.loss)):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-4, atol=1e-5 * true_gradient.abs().max().item())
        for name, value in truth.metrics.items():
            torch.testing.assert_close(out.metrics[name], value, rtol=1e-4, atol=1e-5)


GSPO = gf.LossConfig(loss_type="gspo", epsilon_low=0.5, epsilon_high=0.5)
GRPO = gf.LossConfig(loss_type="grpo", beta=0.1, entropy_coef=0.01)
VESPO = gf.LossConfig(loss_type="vespo")
CALLS = {
    "grpo": Call(GRPO),
    "dapo_num_items": Call(gf.LossConfig(), options={"num_items": 100}),
    "clipped": Call(gf.LossConfig(epsilon_low=0.1, epsilon_high=0.3)),
    "gspo": Call(GSPO),
    "gspo_active": Call(GSPO, per_token=True, options={"metrics_on": "active"}),
    "gspo_packed": Call(GSPO, packed=True, per_token=True),
    "gspo_on_policy": Call(GSPO, on_policy=True, per_token=True),
    "gspo_kl": Call(dataclasses.replace(GSPO, beta=0.5, kl_estimator="k1")),
    "gspo_kl_corrected": Call(dataclasses.replace(GSPO, beta=0.5, bias_corrected_kl=True)),
    "gspo_token": Call(dataclasses.replace(GSPO, importance_sampling_level="sequence_token"), per_token=True),
    "gspo_nonempty": Call(dataclasses.replace(GSPO, aggregation="nonempty_sequence_mean")),
    "vespo": Call(VESPO, per_token=True),
    "vespo_on_policy": Call(VESPO, on_policy=True),
    "vespo_on_policy_per_token": Call(VESPO, on_policy=True, per_token=True),
    "linear": Call(GRPO, linear=True, per_token=True),
    "linear_dapo": Call(gf.LossConfig(), linear=True, per_token=True),
    "linear_gspo": Call(GSPO, linear=True),
    "linear_packed": Call(GSPO, linear=True, packed=True),
}

Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize("name", list(CALLS))
def test_the_fast_path_agrees_with_the_specification(name: str) -> None:
    CALLS[name].compare()


# ---- one fault each


def token_rule_for_active_tokens_of_sequences(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LossInputs, "active", lambda self: self.mask & (self.advantages != 0))


def every_unmasked_token_is_active(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LossInputs, "active", lambda self: self.mask)


def active_fraction_of_all_tokens(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LossInputs, "active_fraction", lambda self: self.active().float().mean())


def weights_per_sequence_off_by_one(patch: pytest.MonkeyPatch) -> None:
    def wrong(name: str, mask: Tensor, sequences: Sequences, *rest: Any, **options: Any) -> Tensor:
        weights = aggregation.aggregation_weights(name, mask, sequences, *rest, **options)
        return weights * sequences.count / (sequences.count + 1)

    patch.setattr(validation, "aggregation_weights", wrong)


def num_items_ignored(patch: pytest.MonkeyPatch) -> None:
    def wrong(name: str, mask: Tensor, sequences: Sequences, num_items: Any = None, *rest: Any, **options: Any) -> Tensor:
        return aggregation.aggregation_weights(name, mask, sequences, None, *rest, **options)

    patch.setattr(validation, "aggregation_weights", wrong)


def empty_sequences_counted(patch: pytest.MonkeyPatch) -> None:
    def wrong(name: str, *rest: Any, **options: Any) -> Tensor:
        return aggregation.aggregation_weights(name.removeprefix("nonempty_"), *rest, **options)

    patch.setattr(validation, "aggregation_weights", wrong)


def sequence_mean_over_masked_tokens_too(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sequences, "mean", lambda self, x, mask: self.total(x * mask) / self.total(torch.ones_like(x)))


def token_level_sum_for_mean(patch: pytest.MonkeyPatch) -> None:
    right = LossInputs.token_level

    def wrong(self: LossInputs) -> LossInputs | None:
        found = right(self)
        if found is None or found is self:
            return found
        return dataclasses.replace(found, advantages=found.advantages * self.sequences.total(self.mask.float()))

    patch.setattr(LossInputs, "token_level", wrong)


def token_level_although_off_policy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        LossInputs, "token_level", lambda self: dataclasses.replace(self, config=dataclasses.replace(self.config, loss_type="grpo"))
    )


def taken_in_another_order(patch: pytest.MonkeyPatch) -> None:
    right = LossInputs.take

    def wrong(self: LossInputs, tokens: Tensor | slice) -> LossInputs:
        taken = right(self, tokens)
        return dataclasses.replace(taken, advantages=taken.advantages.flip(1))

    patch.setattr(LossInputs, "take", wrong)


def packed_column_by_column(patch: pytest.MonkeyPatch) -> None:
    right = LossInputs.packed

    def wrong(self: LossInputs) -> LossInputs:
        columns = self.advantages.expand(self.mask.shape).T.reshape(1, -1)
        return dataclasses.replace(right(self), advantages=columns)

    patch.setattr(LossInputs, "packed", wrong)


def packed_boundaries_off_by_one(patch: pytest.MonkeyPatch) -> None:
    class Wrong(Sequences):
        def __init__(self, token_ids: Tensor, cu_seqlens: Tensor | None = None):
            super().__init__(token_ids, cu_seqlens)
            if self.segment is not None:
                self.segment = torch.cat([self.segment[:1], self.segment[:-1]])

    patch.setattr(validation, "Sequences", Wrong)


def phi_with_the_other_sign_of_lambda(patch: pytest.MonkeyPatch) -> None:
    def wrong(log_ratio: Tensor, advantages: Tensor, log_rollout: Tensor | None, found: Sequences, config: gf.LossConfig) -> Tensor:
        phi = importance.vespo_phi(log_ratio, advantages, log_rollout, found, config)
        log_w = found.total(log_ratio.detach()) + (0 if log_rollout is None else log_rollout)
        lam = torch.where(advantages >= 0, config.vespo_lambda_pos, config.vespo_lambda_neg)
        return phi * torch.exp(-2 * lam * (1 - log_w.exp()))

    for module in (inputs, logprob_loss):
        patch.setattr(module, "vespo_phi", wrong)


def phi_by_the_other_sign_of_the_advantage(patch: pytest.MonkeyPatch) -> None:
    for module in (inputs, logprob_loss):
        patch.setattr(module, "vespo_phi", lambda log_ratio, advantages, *rest: importance.vespo_phi(log_ratio, -advantages, *rest))


def rollout_weight_of_a_sequence_counted_for_each_token(patch: pytest.MonkeyPatch) -> None:
    right = LossInputs.log_rollout
    patch.setattr(LossInputs, "log_rollout", lambda self, m: right(dataclasses.replace(self, rollout_per_sequence=False), m))


def rollout_weights_of_tokens_averaged(patch: pytest.MonkeyPatch) -> None:
    right = LossInputs.log_rollout
    patch.setattr(LossInputs, "log_rollout", lambda self, m: right(dataclasses.replace(self, rollout_per_sequence=True), m))


def product_of_ratios_for_their_geometric_mean(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        logprob_loss, "importance_log_ratio", lambda log_ratio, mask, found, level: found.total(log_ratio * mask).expand_as(log_ratio)
    )


def gradient_of_the_sequence_for_that_of_the_token(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        logprob_loss, "importance_log_ratio", lambda log_ratio, mask, found, level: found.mean(log_ratio, mask).expand_as(log_ratio)
    )


def kl_with_the_other_sign(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(logprob_loss, "kl_penalty", lambda logprobs, ref, *rest: reference.kl_penalty(ref, logprobs, *rest))


def rollout_weights_applied_to_the_kl_too(patch: pytest.MonkeyPatch) -> None:
    right = logprob_loss.token_losses

    def wrong(logprobs: Tensor, given: LossInputs, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert given.rollout_weights is not None
        loss, ratio, kl = right(logprobs, dataclasses.replace(given, rollout_weights=None), *others)
        return loss * given.rollout_weights, ratio, kl

    patch.setattr(logprob_loss, "token_losses", wrong)


def reference_logprobs_passed_as_old_ones(patch: pytest.MonkeyPatch) -> None:
    right = operator_arguments.loss_arguments

    def wrong(rows: Any, given: LossInputs) -> Any:
        return right(rows, dataclasses.replace(given, old_logprobs=given.ref_logprobs))

    for module in ("grpo_fast.loss.api", "grpo_fast.head.loss"):
        patch.setattr(f"{module}.loss_arguments", wrong)


def epsilons_swapped_in_the_shared_surrogate(patch: pytest.MonkeyPatch) -> None:
    """The one function that the sequence-level path takes from the specification: the kernels have their own."""
    right = reference.surrogate

    def wrong(*arguments: Any) -> Tensor:
        config = arguments[-1]
        swapped = dataclasses.replace(config, epsilon_low=config.epsilon_high, epsilon_high=config.epsilon_low)
        return right(*(*arguments[:-1], swapped))

    for module in (reference, logprob_loss):
        patch.setattr(module, "surrogate", wrong)


FAULTS: list[tuple[Patch, str]] = [
    (token_rule_for_active_tokens_of_sequences, "gspo_active"),
    (every_unmasked_token_is_active, "linear_dapo"),
    (every_unmasked_token_is_active, "gspo_active"),
    (active_fraction_of_all_tokens, "dapo_num_items"),
    (weights_per_sequence_off_by_one, "grpo"),
    (weights_per_sequence_off_by_one, "gspo"),
    (num_items_ignored, "dapo_num_items"),
    (empty_sequences_counted, "gspo_nonempty"),
    (sequence_mean_over_masked_tokens_too, "gspo"),
    (sequence_mean_over_masked_tokens_too, "gspo_on_policy"),
    (token_level_sum_for_mean, "gspo_on_policy"),
    (token_level_although_off_policy, "gspo"),
    (taken_in_another_order, "linear"),
    (packed_column_by_column, "linear"),
    (packed_boundaries_off_by_one, "gspo_packed"),
    (packed_boundaries_off_by_one, "linear_packed"),
    (phi_with_the_other_sign_of_lambda, "vespo"),
    (phi_with_the_other_sign_of_lambda, "vespo_on_policy"),
    (phi_by_the_other_sign_of_the_advantage, "vespo"),
    (rollout_weight_of_a_sequence_counted_for_each_token, "vespo_on_policy"),
    (rollout_weights_of_tokens_averaged, "vespo_on_policy_per_token"),
    (product_of_ratios_for_their_geometric_mean, "gspo"),
    (gradient_of_the_sequence_for_that_of_the_token, "gspo_token"),
    (kl_with_the_other_sign, "gspo_kl"),
    (rollout_weights_applied_to_the_kl_too, "gspo_kl_corrected"),
    (reference_logprobs_passed_as_old_ones, "grpo"),
    (reference_logprobs_passed_as_old_ones, "linear"),
    (epsilons_swapped_in_the_shared_surrogate, "clipped"),
]


@pytest.mark.parametrize(("fault", "call"), FAULTS, ids=[f"{fault.__name__}-{call}" for fault, call in FAULTS])
def test_a_fault_in_the_fast_path_is_found(monkeypatch: pytest.MonkeyPatch, fault: Patch, call: str) -> None:
    CALLS[call].compare()
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        CALLS[call].compare()


# ---- no shared code


def test_the_specification_imports_no_code_of_the_fast_paths() -> None:
    """It needs PyTorch and the settings."""
    tree = ast.parse(inspect.getsource(reference))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert imported == {"__future__", "dataclasses", "typing", "math", "torch", "torch.nn.functional", "grpo_fast.loss.config"}


def test_the_fast_paths_take_the_elementwise_surrogate_alone_from_the_specification() -> None:
    """The public functions call the specification as the reference backend; everybody else has no business with it."""
    package = Path(gf.__file__).parent
    users: dict[str, set[str]] = {}
    for folder in ("loss", "ops", "head", "models", "integrations", "trainer"):
        for path in (package / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module in ("grpo_fast.loss.reference", "grpo_fast.loss"):
                    names = {name.name for name in node.names}
                    if node.module.endswith("reference") or "reference" in names:
                        users[path.relative_to(package).as_posix()] = names
    assert users.pop("loss/logprob_loss.py") == {"surrogate", "clipped_tokens"}
    assert users == {"loss/api.py": {"reference"}, "loss/advantages.py": {"reference"}}
