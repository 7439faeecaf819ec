"""Random calls of grpo_loss over every option, with a signal in them: ratios that straddle the clip band, tokens that are almost
certain, masked stretches full of NaN, groups without an advantage. A case is made from its seed alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import grpo_fast as gf

KEPT = 10_000  # seeds from here on make cases with kept sets
POISON = (float("nan"), float("inf"), float("-inf"), 3e38)


BEFORE, AFTER = 1, 2  # columns beside a strided row; an odd sum, so that rows are on every offset


def apart(logits: Tensor) -> Tensor:  # [..., V]
    """A view of the same rows with poison beside each: Inf before it, NaN after it."""
    wide = torch.nn.functional.pad(torch.nn.functional.pad(logits, (BEFORE, 0), value=float("inf")), (0, AFTER), value=float("nan"))
    return wide[..., BEFORE:-AFTER]


def untouched_beside(rows: Tensor) -> bool:
    """Whether the poison of apart() is still there."""
    wide = rows.detach().as_strided((*rows.shape[:-1], rows.shape[-1] + BEFORE + AFTER), rows.stride(), rows.storage_offset() - BEFORE)
    return bool((wide[..., :BEFORE] == float("inf")).all() and wide[..., -AFTER:].isnan().all())


def random_sets(token_ids: Tensor, vocabulary: int, generator: torch.Generator) -> list[list[int]]:
    """Sets of all sizes with the sampled token at any place, some empty."""
    sets = []
    for token in token_ids.flatten().tolist():
        ids = torch.randperm(vocabulary, generator=generator)
        size = [1, 2, 0, 5, 17, vocabulary // 2, vocabulary][int(torch.randint(7, (1,), generator=generator))]
        kept = ids[:size].tolist()
        if kept and token not in kept:
            kept[len(kept) // 2] = token
        sets.append(kept)
    return sets


@dataclass
class Case:
    """The arguments of one call."""

    logits: Tensor
    token_ids: Tensor
    advantages: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, logits: Tensor | None = None, **changed: Any) -> tuple[gf.GRPOOutput, Tensor]:
        """Forward and backward; returns the output and the gradient of the logits."""
        leaf = (self.logits if logits is None else logits).detach().clone().requires_grad_()
        model_output = leaf * 1  # not a leaf, so that inplace is allowed; separate memory
        options = {**self.options, **changed}
        strided = options.pop("strided", False)
        if strided:
            model_output = apart(model_output)
        out = gf.grpo_loss(model_output, self.token_ids, self.advantages, **options)
        out.loss.backward()
        assert leaf.grad is not None
        assert not strided or untouched_beside(model_output), "memory beside the rows was overwritten"
        return out, leaf.grad


def random_config(rng: random.Random) -> gf.LossConfig:
    loss_type = rng.choice(list(gf.LOSS_TYPES))
    row = gf.LOSS_TYPES[loss_type]
    settings: dict[str, Any] = {"loss_type": loss_type, "epsilon_low": rng.choice([0.1, 0.2]), "epsilon_high": rng.choice([0.1, 0.28])}
    if loss_type == "cispo":
        settings["epsilon_high"], settings["cispo_ratio_low"] = rng.choice([1.05, 1.5]), rng.choice([0.0, 0.9])
    if row.surrogate == "clip":
        settings["delta"] = rng.choice([None, 1.3, 2.0])
        settings["dual_clip"] = rng.choice([None, 1.2, 3.0])
    if row.surrogate in ("dppo_tv", "dppo_kl"):
        settings["dppo_mask_low"], settings["dppo_mask_high"] = rng.choice([1e-4, 0.01]), rng.choice([1e-4, 0.01])
        settings["dppo_ratio_max"] = rng.choice([None, 1.1])
    elif row.surrogate not in ("vespo", "reinforce", "gmpo"):
        settings["importance_sampling_level"] = rng.choice([None, None, "token", "sequence", "sequence_token"])
    settings["beta"] = rng.choice([0.0, 0.0, 0.04, 1.0])
    settings["kl_estimator"] = rng.choice(["k1", "k2", "k3"])
    settings["bias_corrected_kl"] = rng.random() < 0.5
    settings["squared_log_ratio_coef"] = rng.choice([0.0, 0.0, 0.0, 0.0, 0.1])
    settings["entropy_coef"] = rng.choice([0.0, 0.0, 0.01, 0.5])
    settings["entropy_aggregation"] = rng.choice(["same", "token_mean"])
    settings["aggregation"] = rng.choice([None, None, "sequence_mean", "token_mean", "global_token_mean", "fixed_length", "sequence_sum"])
    settings["max_completion_length"] = 32
    return gf.LossConfig(**settings)


def random_case(seed: int, dtype: torch.dtype, *, largest_vocabulary: int = 3000) -> Case:
    """Draw the arguments of a call; with kept sets from the seed KEPT on."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    vocabulary = rng.choice([2, 3, 17, 127, 1024, 1025, min(2311, largest_vocabulary)])
    batch, length = rng.choice([(1, 1), (2, 7), (3, 5), (4, 1)])
    config = random_config(rng)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    logits = normal(batch, length, vocabulary, std=rng.choice([0.5, 3.0]))
    token_ids = torch.randint(vocabulary, (batch, length), generator=generator)
    confident = torch.rand(batch, length, generator=generator) < 0.2
    logits.scatter_add_(-1, token_ids.unsqueeze(-1), torch.where(confident, 12.0, 0.0).unsqueeze(-1))
    logits = logits.to(dtype)

    options: dict[str, Any] = {"config": config, "temperature": rng.choice([1.0, 0.6, 1.4])}
    shape = rng.choice(["one", "sequence", "token"])
    if shape != "one":
        options["temperature"] = 0.5 + torch.rand((batch,) if shape == "sequence" else (batch, length), generator=generator)
    options["softcap"] = rng.choice([None, None, 5.0, 30.0])
    options["logit_scale"] = rng.choice([1.0, 0.25])
    sets: list[list[int]] = []
    if seed >= KEPT:
        sets = random_sets(token_ids, vocabulary, generator)
        options["support"] = gf.Support.from_lists(sets)
    with gf.use_backend("reference"):
        scoring = {name: options[name] for name in ("temperature", "softcap", "logit_scale", "support") if name in options}
        logprobs = gf.token_logprobs(logits.double(), token_ids, **scoring).logprobs.float()
    if rng.random() < 0.8:
        options["old_logprobs"] = logprobs + normal(batch, length, std=0.3)
    if config.beta != 0 or rng.random() < 0.3:
        options["ref_logprobs"] = logprobs + normal(batch, length, std=0.5)
    if rng.random() < 0.4:
        options["rollout_weights"] = torch.rand(batch, rng.choice([1, length]), generator=generator) + 0.5
    advantages = normal(batch) if rng.random() < 0.5 else normal(batch, length)
    advantages[torch.rand(advantages.shape, generator=generator) < 0.3] = 0.0
    options["loss_scale"] = rng.choice([1.0, 0.25])
    options["num_items"] = rng.choice([None, 100, torch.tensor(77)])
    options["metrics_on"] = rng.choice(["all", "active"])
    options["inplace"] = rng.random() < 0.5
    options["strided"] = rng.random() < 0.3

    if rng.random() < 0.8:
        mask = torch.rand(batch, length, generator=generator) < 0.7
        mask[0] = True  # at least one token is unmasked
        if seed >= KEPT:  # a masked position may have any set
            tokens, unmasked = token_ids.flatten().tolist(), mask.flatten().tolist()
            drawn = [[x for x in kept if keep or x != y] for kept, y, keep in zip(sets, tokens, unmasked, strict=True)]
            options["support"] = gf.Support.from_lists(drawn)
        logits = poison(logits, mask, seed)
        token_ids = torch.where(mask, token_ids, rng.choice([-100, vocabulary + 5]))
        for name in ("old_logprobs", "ref_logprobs", "rollout_weights", "temperature"):
            value = options.get(name)
            if isinstance(value, Tensor) and value.shape == mask.shape:
                options[name] = torch.where(mask, value, float("nan"))
        advantages = torch.where(mask, advantages, float("nan")) if advantages.dim() == 2 else advantages
        options["mask"] = mask if rng.random() < 0.5 else mask.long()

    case = Case(logits, token_ids, advantages, options)
    layout = rng.choice(["padded", "plus_one", "packed"])
    if layout == "plus_one":
        extra = torch.full((batch, 1, vocabulary), float("nan"), dtype=dtype)
        case.logits = torch.cat([logits, extra], dim=1)
    elif layout == "packed":
        case = packed(case)
    return case


def poison(logits: Tensor, mask: Tensor, seed: int) -> Tensor:
    value = POISON[seed % len(POISON)]
    return torch.where(mask.unsqueeze(-1), logits, torch.tensor(value).to(logits.dtype))


def packed(case: Case) -> Case:
    """The same tokens in one row of N; everything per sequence is repeated for its tokens."""
    batch, length = case.token_ids.shape
    options = dict(case.options)

    def flat(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() == 0:
            return x
        return (x.unsqueeze(1) if x.dim() == 1 else x).expand(batch, length).reshape(-1)

    for name in ("old_logprobs", "ref_logprobs", "rollout_weights", "temperature", "mask"):
        if name in options:
            options[name] = flat(options[name])
    if gf.LOSS_TYPES[options["config"].loss_type].surrogate == "vespo":
        options.pop("rollout_weights", None)  # there a weight per sequence counts once, a weight per token each time
    options["cu_seqlens"] = torch.arange(0, batch * length + 1, length, dtype=torch.int32)
    return Case(case.logits.flatten(0, 1), case.token_ids.reshape(-1), flat(case.advantages), options)
