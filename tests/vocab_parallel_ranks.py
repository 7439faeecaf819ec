"""One of several processes that divide a vocabulary among them; test_linear_vocab_parallel.py starts them and looks at what they leave.

By hand: python tests/vocab_parallel_ranks.py RANK PROCESSES FOLDER
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from hang import HANG
from torch import Tensor

import grpo_fast as gf
from grpo_fast.head import kept

B, T, D, V, R = 3, 6, 8, 37, 2
CUTS = {1: (0, V), 2: (0, 5, V), 4: (0, 2, 11, 30, V)}  # parts of very different sizes
LARGEST_SHARE = 10  # so that sets of up to 3 of the 37 ids are computed by themselves
IN_BFLOAT16 = ("adapter bias", "kept sets gspo bias")


def case(name: str, config: gf.LossConfig, **extra: Any) -> dict[str, Any]:
    """The arguments of one call, the vocabulary whole; every third token almost certain (p about 1 - 1e-9)."""
    generator = torch.Generator().manual_seed(len(name))

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    weight, ids = normal(V, D, std=0.7), torch.randint(V, (B, T), generator=generator)
    hidden = normal(B, T + 1, D)
    pull = weight[ids] / weight[ids].square().sum(-1, keepdim=True)
    sure = torch.arange(B * T).view(B, T, 1) % 3 == 0
    hidden[:, :T] = torch.where(sure, 30 * pull, hidden[:, :T])
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 4:] = False
    tensors = {"hidden": hidden, "weight": weight}
    if "bias" in name:
        tensors["bias"] = normal(V)
    if "adapter" in name:
        tensors |= {"adapted": normal(B, T + 1, R), "adapter_weight": normal(V, R, std=0.5)}
    options: dict[str, Any] = {"mask": mask, "temperature": 0.8, **extra}
    if "support" in extra:  # of one id, within one part of the vocabulary, in several, in all, and of none
        sizes = [1, 2, 0, 3, 20, V]
        drawn = [torch.randperm(V, generator=generator).tolist() for _ in range(B * T)]
        tokens = ids.flatten().tolist()
        sets = [([y] + [x for x in order if x != y])[: sizes[n % 6]] for n, (y, order) in enumerate(zip(tokens, drawn, strict=True))]
        options["support"] = gf.Support.from_lists(sets)
    exact = {key: x.double() for key, x in tensors.items()}
    logprobs = gf.linear_token_logprobs(**called(exact), token_ids=ids, **options).logprobs.float()
    options |= {"old_logprobs": logprobs + normal(B, T, std=0.2), "ref_logprobs": logprobs + normal(B, T, std=0.2)}
    if "on-policy" in name:
        del options["old_logprobs"]
    advantages = torch.tensor([1.0, -0.5, 0.0 if "active" in name else 0.6])
    return {"tensors": tensors, "token_ids": ids, "advantages": advantages, "options": options, "config": config}


def cases() -> dict[str, dict[str, Any]]:
    grpo, gspo = gf.LossConfig(beta=0.1), gf.LossConfig(loss_type="gspo", epsilon_low=0.3, epsilon_high=0.3)
    entropy, vespo = gf.LossConfig(entropy_coef=0.3), gf.LossConfig(loss_type="vespo")
    given = {"token": grpo, "active": grpo, "gspo": gspo, "gspo on-policy": gspo, "vespo": vespo, "entropy": entropy}
    given |= {"bias": gspo, "adapter bias": entropy, "active gspo": gspo, "on-policy": gf.LossConfig()}
    found = {name: case(name, config) for name, config in given.items()}
    found |= {"softcap": case("softcap", grpo, softcap=8.0, logit_scale=0.5), "active all": case("active all", gf.LossConfig())}
    for name, config in (("kept sets", entropy), ("kept sets gspo bias", gspo), ("kept sets adapter", vespo)):
        found[name] = case(name, config, support=None)
    return found


def called(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """As the functions take them."""
    found: dict[str, Any] = dict(tensors)
    if "adapted" in found:
        found["adapter"] = (found.pop("adapted"), found.pop("adapter_weight"))
    return found


def measured(name: str, of: dict[str, Any], part: slice, group: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Loss and log-probabilities of one case with this part of the vocabulary, and their gradients."""
    common: dict[str, Any] = {"process_group": group, "chunk_bytes": 4 * 4 * V} if group is not None else {}

    def leaves() -> dict[str, Tensor]:
        split = ("weight", "bias", "adapter_weight")
        return {key: (x[part] if key in split else x).to(dtype).clone().requires_grad_() for key, x in of["tensors"].items()}

    tensors = leaves()
    metrics_on = "all" if name == "active all" else "active"
    out = gf.linear_grpo_loss(
        **called(tensors),
        token_ids=of["token_ids"],
        advantages=of["advantages"],
        config=of["config"],
        metrics_on=metrics_on,
        **of["options"],
        **common,
    )
    (2 * out.loss).backward()
    found = {"loss": out.loss.detach(), "logprobs": out.logprobs, "entropy": out.entropy, **{f"m.{k}": x for k, x in out.metrics.items()}}
    found |= {f"d.{key}": x.grad for key, x in tensors.items() if x.grad is not None}

    scoring = {key: x for key, x in of["options"].items() if key not in ("old_logprobs", "ref_logprobs")}
    exact = {key: x.double() for key, x in of["tensors"].items()}
    whole = torch.nn.functional.linear(exact["hidden"], exact["weight"], exact.get("bias"))
    if "adapted" in exact:
        whole = whole + exact["adapted"] @ exact["adapter_weight"].T
    logits = whole[..., part].to(dtype).clone().requires_grad_()
    sharded = {"process_group": group} if group is not None else {}
    from_logits = gf.grpo_loss(logits, of["token_ids"], of["advantages"], config=of["config"], **of["options"], **sharded)
    from_logits.loss.backward()
    found |= {"logits.loss": from_logits.loss.detach(), "logits.entropy": from_logits.entropy}
    assert logits.grad is not None
    found["d.logits"] = logits.grad.movedim(-1, 0)  # [V of the part, B, T + 1]

    upstream = torch.linspace(-1, 1, B * T).view(B, T)
    for kind, frozen, keep in (("trainable", False, 0), ("kept", False, 1 << 30), ("frozen", True, 0)):
        tensors = leaves()
        for key in ("weight", "bias", "adapter_weight"):
            if frozen and key in tensors:
                tensors[key].requires_grad_(False)
        lp = gf.linear_token_logprobs(**called(tensors), token_ids=of["token_ids"], **scoring, **common, keep_bytes=keep)
        total = (lp.logprobs * upstream).sum() + (0 if kind == "frozen" else lp.entropy.sum())
        total.backward()
        found |= {f"{kind}.logprobs": lp.logprobs.detach(), f"{kind}.entropy": lp.entropy.detach()}
        found |= {f"{kind}.d.{key}": x.grad for key, x in tensors.items() if x.grad is not None}
    return found


def messages(part: slice, group: Any) -> dict[str, str]:
    """The errors of bad calls, the same in every process."""
    hidden, weight = torch.randn(B, T, D), torch.randn(V, D)[part]
    ids = torch.zeros(B, T, dtype=torch.int64)
    found = {}
    changes: dict[str, dict[str, Any]] = {
        "float64": {"hidden": hidden.double(), "weight": weight.double()},
        "callable": {"weight": lambda x: x},
        "negative": {"token_ids": ids - 1},
        "too large": {"token_ids": ids + V},
    }
    for name, change in changes.items():
        call = {"hidden": hidden, "weight": weight, "token_ids": ids, "advantages": torch.ones(B), **change}
        try:
            found[name] = f"{gf.linear_grpo_loss(**call, process_group=group).loss.item()}"
        except (TypeError, ValueError) as error:
            found[name] = str(error)
    return found


def results_of(rank: int, group: Any, names: Iterable[str], dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """What one rank of the group finds."""
    cuts, of = CUTS[torch.distributed.get_world_size(group)], cases()
    return {name: measured(name, of[name], slice(*cuts[rank : rank + 2]), group, dtype) for name in names}


def main() -> None:
    kept.LARGEST_SHARES |= dict.fromkeys(kept.LARGEST_SHARES, LARGEST_SHARE)
    rank, processes, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), processes)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=HANG))
    group = torch.distributed.group.WORLD
    results = results_of(rank, group, cases(), torch.float32)
    time.sleep(0.01 * (processes - rank))  # the first rank arrives last
    in_bfloat16 = results_of(rank, group, IN_BFLOAT16, torch.bfloat16)
    bad_calls = messages(slice(*CUTS[processes][rank : rank + 2]), group)
    torch.save({"results": results, "in bfloat16": in_bfloat16, "messages": bad_calls}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
