"""The cases of `grpo-fast bench-kept` on a GPU: the head over kept sets, in turn with the same head over the whole vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_measure import Results, Timer, check_device, run_case
from torch import Tensor

from grpo_fast.benchmark.head.implementations import SAMPLED, SEQUENCES, Gradients, HeadCase, Truth
from grpo_fast.benchmark.kept.implementations import OVER_SETS, KeptCase, check, make_kept, make_kept_case
from grpo_fast.benchmark.kept.suite import TOP_P, ids_of, sizes_of

TOKENS = 2048
SIZES = ("32", "128", "512", TOP_P, "1", "8", "2048")  # what is quoted first comes first
SHARES = ("V/32", "V/64", "V/128", "V/16")  # where both ways may take the same time
# Computed beside the sets: the gathering implementation copies the rows of 64 tokens, of which a backward pass needs all.
IMPLEMENTATIONS = {**dict.fromkeys(SIZES, ("kept", "gather", "ours")), **dict.fromkeys(SHARES, ("apart", "chunks"))}
LARGEST_GATHERED = 2**22  # ids of all tokens


def kept_sets(
    tokens: int, width: int, vocabulary: int, dtype: torch.dtype, timer: Timer, device: str, deadline: float, results: Results
) -> None:
    """Time every size of the sets with a frozen and with a trainable head; entries have the implementation as `name`."""
    tokens = max(SEQUENCES, min(tokens, TOKENS) // SEQUENCES * SEQUENCES)
    sizes = [size for size in IMPLEMENTATIONS if size == TOP_P or 1 <= ids_of(size, vocabulary) <= vocabulary // 4]
    for size in sizes:
        entry = {"rows": tokens, "width": width, "vocabulary": vocabulary, "dtype": str(dtype).removeprefix("torch."), "size": size}
        needed = 16 * vocabulary * width + 8 * tokens * vocabulary
        made: list[KeptCase] = []

        def make(size: str = size, made: list[KeptCase] = made) -> dict[str, Any]:
            made.append(make_kept_case(head_case(tokens, width, vocabulary, dtype, device), sizes_of(size, tokens, vocabulary, 0), seed=0))
            return {}

        done = run_case({**entry, "name": "data"}, make, needed, device, deadline)
        if not made:
            results.add(done)
            continue
        (case,) = made
        for trainable in (False, True):
            of_head = {**entry, "trainable": trainable, "mean_size": case.support.token_ids.numel() / tokens}
            names = [n for n in IMPLEMENTATIONS[size] if n != "gather" or case.support.token_ids.numel() <= LARGEST_GATHERED]
            if all(results.has({**of_head, "name": name}) for name in names):
                continue
            measured: dict[str, dict[str, Any]] = {}

            def work(
                names: list[str] = names, case: KeptCase = case, trainable: bool = trainable, measured: dict[str, Any] = measured
            ) -> dict[str, Any]:
                calls = [gradients(name, case, trainable) for name in names]
                for name, (call, found) in zip(names, calls, strict=True):
                    call(None)
                    verdict = check(found[0], case) if name in OVER_SETS else None
                    if verdict is not None and not verdict.passed:
                        raise ValueError(f"wrong: {name}: {verdict.errors_for_json()}")
                times = timer.in_turn(*((call, found.clear) for call, found in calls))
                measured.update(zip(names, times, strict=True))
                return {}

            done = run_case({**of_head, "name": "+".join(names)}, work, needed, device, deadline)
            for name, times in measured.items():
                question = "kept sets" if name in OVER_SETS else "whole vocabulary"
                of_last = measured[names[-1]]["ms"]  # of the same head over the whole vocabulary, the sets included where it is `chunks`
                results.add({**of_head, "name": name, "question": question, **times, "times_faster": of_last / times["ms"]})
            if not measured:
                results.add(done)
            check_device(device)


def head_case(tokens: int, width: int, vocabulary: int, dtype: torch.dtype, device: str) -> HeadCase:
    """Random data as those of `grpo-fast bench-kept`, whose truth make_kept_case computes."""
    generator = torch.Generator().manual_seed(0)
    length = tokens // SEQUENCES

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    token_ids = torch.randint(vocabulary, (SEQUENCES, length), generator=generator).to(device)
    sampled, none = torch.linspace(0, tokens - 1, SAMPLED).long(), torch.zeros(0, width, device=device)
    return HeadCase(
        hidden=normal(SEQUENCES, length, width),
        weight=normal(vocabulary, width) * (1.5 / width**0.5),
        token_ids=token_ids,
        advantages=torch.randn(SEQUENCES, generator=generator).to(device),
        old_logprobs=torch.zeros(token_ids.shape, device=device),
        mask=torch.ones_like(token_ids),
        truth=Truth(0.0, sampled, none, sampled, none),
    )


def gradients(name: str, case: KeptCase, trainable: bool) -> tuple[Callable[[Any], None], list[Gradients]]:
    """A call that computes the loss and its gradients, and where it leaves them."""
    step = make_kept(name, case)
    hidden, weight = case.head.hidden.detach().requires_grad_(), case.head.weight.detach().requires_grad_(trainable)
    found: list[Gradients] = []

    def call(_: Any) -> None:
        loss = step(hidden, weight)
        d_hidden, *rest = torch.autograd.grad(loss, (hidden, weight) if trainable else (hidden,))
        # The loss is read by the gate only: `item` would wait for the device.
        found[:] = [Gradients(loss.detach(), d_hidden.flatten(0, -2), rest[0] if rest else None)]  # type: ignore[arg-type]

    return call, found
