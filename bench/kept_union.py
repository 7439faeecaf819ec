"""Does it pay to score small kept sets by one product over the union of a block's ids? For tokens that a model has sampled with top-k.

    python bench/kept_union.py MODEL_FOLDER --output bench/results/kept_union_cpu.json

Compares the package's products at single rows of the weight with products over the union, block by block: logits and the gradient of hidden
states, frozen head, CPU time of one thread, the least of several in turn. The first samples; docs/kept-sets.md has the decision.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo_fast.ops.kept_products  # noqa: F401  defines the operators
from grpo_fast.ops import extension
from grpo_fast.ops.environment import describe, load_average

PROMPTS = (
    "What is 17 times 23? Think step by step.",
    "Write a short story about a lighthouse.",
    "Explain why the sky is blue.",
    "List three uses of a paperclip.",
    "Translate to French: I would like a cup of coffee.",
    "A train travels 60 km in 45 minutes. How fast is it?",
    "Write a Python function that reverses a string.",
    "Who wrote Hamlet and why does it matter?",
)
TOP_K, NEW_TOKENS, BLOCKS, ROUNDS = 50, 64, (16, 64, 256, 512), 7


def sampled_states(folder: str) -> tuple[Tensor, Tensor]:
    """Hidden states [N, D] that score sampled tokens, sequence by sequence, and the head's weight [V, D]."""
    torch.manual_seed(0)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer.padding_side = "left"
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": x}], tokenize=False, add_generation_prompt=True) for x in PROMPTS]
    given = tokenizer(chats, return_tensors="pt", padding=True)
    with torch.no_grad():
        ids = model.generate(**given, do_sample=True, temperature=1.0, top_k=TOP_K, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
        mask = torch.cat([given.attention_mask, torch.ones(len(PROMPTS), NEW_TOKENS, dtype=torch.int64)], 1)
        states = model.model(ids, attention_mask=mask).last_hidden_state[:, -NEW_TOKENS - 1 : -1]
    return states.reshape(-1, states.shape[-1]).contiguous(), model.lm_head.weight.detach()


def at_single_rows(hidden: Tensor, weight: Tensor, columns: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    operators = torch.ops.grpo_fast
    return operators.kept_logits(hidden, weight, columns), operators.kept_hidden_gradient(g, weight, columns)


def over_unions(hidden: Tensor, weight: Tensor, columns: Tensor, g: Tensor, block: int) -> tuple[Tensor, Tensor]:
    logits, gradients = [], []
    for h, ids, g_rows in zip(hidden.split(block), columns.split(block), g.to(hidden.dtype).split(block), strict=True):
        union, place = ids.unique(return_inverse=True)
        rows = weight[union]
        product = h @ rows.T
        logits.append(product.gather(1, place))
        gradients.append(torch.zeros_like(product).scatter_(1, place, g_rows) @ rows)
    return torch.cat(logits), torch.cat(gradients)


def least(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The least CPU time of each, in milliseconds."""
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            found[name] = min(found[name], 1e3 * (time.thread_time() - start))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    extension.load()
    states, head = sampled_states(options.model)
    logits, (tokens, vocabulary) = states @ head.T, (len(states), len(head))
    sets = {f"top-k {k}": logits.topk(k).indices.sort().values for k in (20, TOP_K, 200)}
    sets["50 ids at random"] = torch.stack([torch.randperm(vocabulary)[:50].sort().values for _ in range(tokens)])
    sets["the same 50 ids"] = sets[f"top-k {TOP_K}"][:1].expand(tokens, -1).contiguous()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = states.to(dtype), head.to(dtype)
        for name, columns in sets.items():
            g = torch.randn(columns.shape)
            for a, b in zip(at_single_rows(states, head, columns, g), over_unions(states, head, columns, g, BLOCKS[0]), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
            calls: dict[str, Callable[[], Any]] = {"single rows": partial(at_single_rows, hidden, weight, columns, g)}
            calls |= {str(block): partial(over_unions, hidden, weight, columns, g, block) for block in BLOCKS}
            ms = least(calls)
            unions = {str(n): sum(len(x.unique()) for x in columns.split(n)) / len(columns.split(n)) for n in BLOCKS}
            best = min(ms[str(n)] for n in BLOCKS)
            entry = {
                "dtype": str(dtype).removeprefix("torch."),
                "sets": name,
                "ms": ms,
                "union": unions,
                "times_faster": ms["single rows"] / best,
            }
            results.append(entry)
            print(entry)
    machine = {"machine": describe(), "load_average": load_average(), "tokens": tokens, "width": head.shape[1], "vocabulary": vocabulary}
    options.output.write_text(json.dumps({**machine, "model": Path(options.model).name, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
