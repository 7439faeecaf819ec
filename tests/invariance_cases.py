"""Random calls of the head, each repeated with the same tokens in other surroundings: which bits must be the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from rank_threads import run_as_ranks
from torch import Tensor
from torch.distributed import ProcessGroup

import grpo_fast as gf

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NUM_ITEMS = 50  # given, since the number of a call's own tokens depends on the call
CONFIGS: list[gf.LossConfig | None] = [  # None: log-probabilities
    None,
    None,
    gf.LossConfig(beta=0.1),
    gf.LossConfig(entropy_coef=0.2),
    gf.LossConfig(loss_type="cispo", epsilon_high=2.0),
    gf.LossConfig(loss_type="sapo", aggregation="global_token_mean"),
]


class Results(NamedTuple):
    """Of one call."""

    of_tokens: dict[str, Tensor]  # [n, ...]
    of_head: dict[str, Tensor]  # gradients of the head's parameters


@dataclass
class RandomCall:
    """Tokens with everything that belongs to them, and the settings of the call."""

    tokens: dict[str, Tensor]  # hidden, adapted, token_ids, temperature, g, h, advantages, old_logprobs, ref_logprobs
    sets: list[list[int]] | None
    head: dict[str, Tensor]  # weight, bias, adapter_weight
    trainable: bool
    config: gf.LossConfig | None
    options: dict[str, Any]
    processes: int  # that share the vocabulary
    with_entropy: bool  # log-probabilities: whether the entropy has a gradient, too
    wrap: Callable[[Any], Any] = field(default=lambda function: function, repr=False)  # torch.compile

    @classmethod
    def random(cls, seed: int) -> RandomCall:
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        n, width, vocabulary = rng.randint(3, 150), rng.randint(5, 70), rng.choice([rng.randint(9, 300), rng.randint(300, 900)])
        dtype = DTYPES[seed % 3]

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator) * std

        head = {"weight": normal(vocabulary, width, std=2 / width**0.5).to(dtype)}
        tokens = {"hidden": normal(n, width).to(dtype), "token_ids": torch.randint(vocabulary, (n,), generator=generator)}
        if rng.random() < 0.4:
            head["bias"] = normal(vocabulary).to(dtype)
        if rng.random() < 0.4:
            tokens["adapted"], head["adapter_weight"] = normal(n, 3).to(dtype), normal(vocabulary, 3).to(dtype)
        tokens |= {name: normal(n) for name in ("g", "h", "advantages")}
        tokens["advantages"][torch.rand(n, generator=generator) < rng.choice([0.0, 0.3])] = 0
        if rng.random() < 0.4:
            tokens["temperature"] = 0.3 + torch.rand(n, generator=generator)
        sets: list[list[int]] | None = None
        if rng.random() < 0.6:  # without a set, of one id, small (logits at single ids), and large (logits of the whole vocabulary)
            sets, small = [], max(vocabulary // 32, 1)
            for token in tokens["token_ids"].tolist():
                size = rng.choice([0, 1, rng.randint(1, small), rng.randint(1, small), rng.randint(small, vocabulary)])
                others = [x for x in rng.sample(range(vocabulary), size) if x != token][: max(size - 1, 0)]
                sets.append([token, *others] if size else [])
        options: dict[str, Any] = {"softcap": rng.choice([None, 5.0]), "logit_scale": rng.choice([1.0, 0.7])}
        options["logits_dtype"] = rng.choice(["float32", "float32", "input"])
        processes = rng.choice([1, 1, 1, 3])
        call = cls(tokens, sets, head, rng.random() < 0.6, None, options, processes, rng.random() < 0.6)
        logprobs = call.run(torch.arange(n)).of_tokens["logprobs"]  # those of the loss lie near, within and beyond the clip
        tokens["old_logprobs"], tokens["ref_logprobs"] = logprobs + 0.3 * normal(n), logprobs + 0.3 * normal(n)
        return replace(call, config=rng.choice(CONFIGS))

    @property
    def count(self) -> int:
        return len(self.tokens["token_ids"])

    def run(self, at: Tensor, **options: Any) -> Results:
        """Forward and backward of a call with these tokens.

        Args:
            at: int64 ``[n]``; -1 is a masked position, where everything is NaN, and its id is out of range.
            options: ``chunk``: logits of about this number of tokens are in memory at a time; ``rows``: the number of sequences of a padded
                batch, None: packed; ``keep_bytes``.
        """
        if self.processes == 1:
            return self._run(at, None, slice(None), **options)
        bounds = torch.linspace(0, self.head["weight"].shape[0], self.processes + 1).long().tolist()
        found = run_as_ranks(self.processes, lambda rank, group: self._run(at, group, slice(*bounds[rank : rank + 2]), **options))
        for other in found[1:]:
            assert all(torch.equal(x, other.of_tokens[name]) for name, x in found[0].of_tokens.items()), "the ranks differ"
        return Results(found[0].of_tokens, {name: torch.cat([x.of_head[name] for x in found]) for name in found[0].of_head})

    def _run(
        self, at: Tensor, group: ProcessGroup | None, part: slice, *, chunk: int = 512, rows: int | None = None, keep_bytes: int = 1 << 30
    ) -> Results:
        real = at >= 0
        mask = None if bool(real.all()) else real

        def shaped(x: Tensor) -> Tensor:
            return x if rows is None else x.view(rows, -1, *x.shape[1:])

        given = {}
        for name, x in self.tokens.items():
            x = x[at.clamp(min=0)]
            poison = -100 if name == "token_ids" else 1.0 if name == "temperature" else 0.0 if name in ("g", "h") else torch.nan
            given[name] = torch.where(real.view(-1, *[1] * (x.dim() - 1)), x, poison)
        leaves = {name: given.pop(name).requires_grad_() for name in ("hidden", "adapted") if name in given}
        head = {name: x[part].clone().requires_grad_(self.trainable) for name, x in self.head.items()}
        given = {name: shaped(x) for name, x in given.items()}
        options: dict[str, Any] = {"temperature": 0.8, **self.options, "chunk_bytes": chunk * (4 * self.head["weight"].shape[0] + 64)}
        if group is not None:
            options["process_group"] = group
        if self.sets is not None:
            options["support"] = gf.Support.from_lists([self.sets[i] if i >= 0 else [] for i in at.tolist()])
        if "temperature" in given:
            options["temperature"] = given["temperature"]
        if "adapted" in leaves:
            options["adapter"] = (shaped(leaves["adapted"]), head["adapter_weight"])
        options |= {"bias": head.get("bias"), "mask": None if mask is None else shaped(mask)}
        call = (shaped(leaves["hidden"]), head["weight"], given["token_ids"])
        if self.config is None:
            out: Any = self.wrap(gf.linear_token_logprobs)(*call, keep_bytes=keep_bytes, **options)
            (out.logprobs * given["g"] + (out.entropy * given["h"] if self.with_entropy else 0)).sum().backward()
        else:
            options |= {"old_logprobs": given["old_logprobs"], "config": self.config, "num_items": NUM_ITEMS}
            if self.config.beta != 0:
                options["ref_logprobs"] = given["ref_logprobs"]
            if rows is None:
                options["cu_seqlens"] = torch.tensor([0, len(at) // 3, len(at)])
            out = self.wrap(gf.linear_grpo_loss)(*call, given["advantages"], **options)
            out.loss.backward()
        of_tokens = {"logprobs": out.logprobs.detach().view(-1), "entropy": out.entropy.detach().view(-1)}
        of_tokens |= {f"d.{name}": x.grad for name, x in leaves.items() if x.grad is not None}
        return Results(of_tokens, {f"d.{name}": x.grad for name, x in head.items() if x.grad is not None})

    def surroundings(self, seed: int) -> list[tuple[str, Tensor, dict[str, Any]]]:
        """Name, tokens and options of calls in which these tokens stand, ``in order`` where they are all there in their order."""
        generator = torch.Generator().manual_seed(seed)
        n, everything = self.count, torch.arange(self.count)
        order = torch.randperm(n, generator=generator)
        padded = torch.full((2 * n,), -1)
        padded[torch.randperm(2 * n, generator=generator)[:n].sort().values] = everything
        rows = 3
        length = -(-n // rows) + 2
        left_padded = torch.full((rows, length), -1)
        for row, tokens in zip(left_padded, everything.split(length - 2), strict=False):
            row[length - len(tokens) :] = tokens
        found: list[tuple[str, Tensor, dict[str, Any]]] = [(f"in order, chunks of {x}", everything, {"chunk": x}) for x in (1, 70, 128)]
        found += [("permuted", order, {}), ("some", order[: n // 2], {}), *(("alone", order[i : i + 1], {}) for i in range(2))]
        found += [("in order among masked tokens", padded, {"chunk": 64})]
        found += [("in order, computed again", everything, {"keep_bytes": 0})]
        found += [("in order, padded", left_padded.flatten(), {"chunk": 64, "rows": rows})]
        if self.sets is not None:
            sizes = torch.tensor([len(x) for x in self.sets])
            small = self.head["weight"].shape[0] // 32
            for name, chosen in (("no set", sizes == 0), ("small sets", (sizes > 0) & (sizes <= small)), ("large sets", sizes > small)):
                found.append((name, chosen.nonzero().flatten(), {}))
        return [entry for entry in found if len(entry[1]) > 0]

    def check(self, seed: int) -> None:
        """Compare the bits of all these calls, and of other numbers of threads."""
        everything = torch.arange(self.count)
        whole = self.run(everything)
        threads = torch.get_num_threads()
        for name, at, options in [*self.surroundings(seed), ("in order, threads", everything, {})]:
            if "threads" in name:
                torch.set_num_threads(2 if threads == 1 else 1)
            try:
                found = self.run(at, **options)
            finally:
                torch.set_num_threads(threads)
            real = at >= 0
            different = [key for key, x in found.of_tokens.items() if not torch.equal(x[real], whole.of_tokens[key][at[real]])]
            if "in order" in name:
                different += [key for key, x in found.of_head.items() if not torch.equal(x, whole.of_head[key])]
            assert not different, f"seed {seed}, {name}: {different}"
