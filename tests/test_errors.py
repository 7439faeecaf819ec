"""The arguments that grpo_loss and token_logprobs reject, one by one: the error names the problem and its fix, and no tensor is written.

Every case is a change of arguments that are right, the error it must raise, and the pieces its message must hold: the argument, what
it was, what was expected, and the fix.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import grpo_fast as gf
from grpo_fast.loss.config import LossConfig
from grpo_fast.ops import extension

NAN, INF = math.nan, math.inf
B, T, V = 2, 3, 5
N = 6
BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(not extension.load(), reason=f"the extension is not loaded: {extension.status().why}")),
]
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


class Case(NamedTuple):
    """A wrong argument; ``change`` makes it from the right ones."""

    name: str
    change: Callable[[dict[str, Any]], Any]
    error: type[Exception]
    pieces: tuple[str, ...]  # in this order, regular expressions
    packed: bool = False  # starts from packed arguments
    also: dict[str, Any] = {}  # noqa: RUF012 other arguments that the case needs

    def __str__(self) -> str:
        return self.name


def right(packed: bool) -> dict[str, Any]:
    """Arguments that grpo_loss takes; the logits are a model's output, so that they may be written over."""
    shape = (N,) if packed else (B, T)
    arguments: dict[str, Any] = {
        "logits": torch.randn(*shape, V, requires_grad=True) * 1.0,
        "token_ids": torch.randint(V, shape),
        "advantages": torch.randn(N if packed else B),
        "old_logprobs": -torch.rand(shape),
        "ref_logprobs": -torch.rand(shape),
        "mask": torch.ones(shape, dtype=torch.bool),
        "rollout_weights": torch.rand(shape),
        "temperature": torch.rand(shape) + 0.5,
        "config": LossConfig(beta=0.1),
        "inplace": True,
    }
    return {**arguments, "cu_seqlens": torch.tensor([0, 4, 6], dtype=torch.int32)} if packed else arguments


def to(value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda _: value


def with_item(index: tuple[int, ...] | int, value: float) -> Callable[[Any], Tensor]:
    """The valid tensor with one element replaced."""

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[index] = value
        return x

    return change


def item_of(name: str, index: tuple[int, ...], value: float, dtype: torch.dtype | None = None) -> Callable[[dict[str, Any]], Tensor]:
    """The valid argument of this name, converted to dtype, with one element replaced."""
    return lambda x: with_item(index, value)(x[name].to(dtype or x[name].dtype))


def converted(name: str, dtype: torch.dtype) -> Callable[[dict[str, Any]], Tensor]:
    """The valid argument of this name in another dtype."""
    return lambda x: x[name].detach().to(dtype)


def of_every_tensor(name: str, shape: str, packed: bool = False, floating: bool = True) -> list[Case]:
    """What every tensor argument rejects: other types, devices, layouts, and shapes with a size or a dimension too many."""
    fix = rf"Wrap it: torch.as_tensor\({name}" if name != "logits" else "A model's output holds it as .logits"
    dense = r"expected a dense tensor. Convert it: " + name
    return [
        Case(f"{name}-list", lambda x: x[name].tolist(), TypeError, (f"^{name} is a list", "expected a .*torch.Tensor", fix), packed),
        Case(f"{name}-array", lambda x: x[name].detach().numpy(), TypeError, (f"^{name} is a ndarray", "expected a .*Tensor", fix), packed),
        Case(f"{name}-device", lambda x: x[name].to("meta"), ValueError, (f"{name} is on meta, logits are on cpu", "Move it"), packed)
        if name != "logits"
        else Case("logits-str", to("logits"), TypeError, ("^logits is a str", "expected a floating-point torch.Tensor", fix), packed),
        Case(
            f"{name}-sparse", lambda x: x[name].detach().to_sparse(), TypeError, (f"^{name} has the layout torch.sparse_coo", dense), packed
        ),
        Case(f"{name}-longer", lambda x: torch.cat([x[name]] * 2), ValueError, (f"{name} has shape", "expected", re.escape(shape)), packed)
        if name not in ("logits", "cu_seqlens")
        else Case(f"{name}-0d", lambda x: x[name].sum().to(x[name].dtype), ValueError, (f"{name} has shape \\[\\]", "expected"), packed),
        Case(
            f"{name}-deeper",
            lambda x: x[name].unsqueeze(-1).unsqueeze(-1),
            ValueError,
            (f"{name} has shape", "expected", re.escape(shape)),
            packed,
        ),
        Case(
            f"{name}-complex", lambda x: x[name].to(torch.complex64), TypeError, (f"^{name} has dtype torch.complex64", "expected"), packed
        ),
    ] + (
        [
            Case(
                f"{name}-{str(dtype).removeprefix('torch.')}",
                converted(name, dtype),
                TypeError,
                (f"^{name} has dtype {dtype}", "expected float32, bfloat16, float16 or float64", rf"Convert it: {name}.float\(\)"),
                packed,
            )
            for dtype in (torch.int64, torch.bool, torch.float8_e4m3fn)
        ]
        if floating
        else []
    )


ANY_SHAPE = r"(sizes follow from logits and token_ids)"
TEMPERATURE = "greedy decoding .0. has no policy to train"
CASES: list[Case] = [
    # logits
    *of_every_tensor("logits", "[B, T, V], [B, T + 1, V] or packed [N, V]"),
    Case("logits-none", to(None), TypeError, ("^logits is a NoneType", "expected")),
    Case("logits-1d", to(torch.randn(V)), ValueError, (r"logits has shape \[5\]; expected \[B, T, V\]",)),
    Case("logits-vocabulary-of-one", to(torch.randn(B, T, 1)), ValueError, ("logits has a vocabulary of 1; expected at least 2",)),
    Case("logits-vocabulary-of-none", to(torch.randn(B, T, 0)), ValueError, ("logits has a vocabulary of 0; expected at least 2",)),
    Case(
        "logits-another-batch", to(torch.randn(3, T, V)), ValueError, (r"token_ids has shape \[2, 3\]; expected", r"\[3, 3\]", r"\[3, 2\]")
    ),
    Case("logits-too-long", to(torch.randn(B, T + 2, V)), ValueError, (r"token_ids has shape \[2, 3\]; expected", r"T \+ 1, V")),
    Case("logits-too-short", to(torch.randn(B, T - 1, V)), ValueError, (r"token_ids has shape \[2, 3\]; expected", r"\[2, 2\]")),
    Case("logits-nested", to(torch.nested.nested_tensor([torch.randn(T, V)] * B, layout=torch.jagged)), TypeError, ("nested", "or pad")),
    Case("logits-packed-too-long", to(torch.randn(N + 1, V)), ValueError, (r"token_ids has shape \[6\]; expected \[N\] = \[7\]",), True),
    # token_ids
    *of_every_tensor("token_ids", "[B, T]", floating=False),
    *[
        Case(
            f"token_ids-{dtype}",
            converted("token_ids", dtype),
            TypeError,
            (f"token_ids has dtype {dtype}; expected torch.int64", r"Convert it: token_ids.long\(\)"),
        )
        for dtype in (torch.int32, torch.int16, torch.uint8, torch.bool, torch.float32)
    ],
    Case("token_ids-none", to(None), TypeError, ("^token_ids is a NoneType; expected a torch.Tensor",)),
    Case("token_ids-flat", lambda x: x["token_ids"].reshape(-1), ValueError, (r"token_ids has shape \[6\]; expected \[B, T\]",)),
    *[
        Case(
            f"token_ids-{value}",
            item_of("token_ids", (1, 2), value),
            ValueError,
            (rf"token_ids\[1, 2\] is {value}; expected 0 <= id < 5, the vocabulary of logits", "Set the mask to 0 on padding"),
        )
        for value in (-1, -100, V, 2**40)
    ],
    Case(
        "token_ids-packed-range",
        lambda x: with_item(4, V)(x["token_ids"]),
        ValueError,
        (r"token_ids\[4\] is 5; expected 0 <= id < 5", "Set the mask to 0"),
        True,
    ),
    # advantages
    *of_every_tensor("advantages", "[B]"),
    Case("advantages-none", to(None), TypeError, ("^advantages is a NoneType; expected a torch.Tensor",)),
    Case("advantages-number", to(1.0), TypeError, ("^advantages is a float; expected a torch.Tensor",)),
    Case(
        "advantages-0d", to(torch.tensor(1.0)), ValueError, (r"advantages has shape \[\]; expected \[B, T\] = \[2, 3\] or \[B\] = \[2\]",)
    ),
    Case("advantages-column", to(torch.randn(B, 1)), ValueError, (r"advantages has shape \[2, 1\]; expected",)),
    Case("advantages-by-position", to(torch.randn(T)), ValueError, (r"advantages has shape \[3\]; expected",)),
    Case("advantages-by-packed-sequence", to(torch.randn(2)), ValueError, (r"advantages has shape \[2\]; expected \[N\] = \[6\]",), True),
    # old and reference log-probabilities
    *of_every_tensor("old_logprobs", "[B, T]"),
    *of_every_tensor("ref_logprobs", "[B, T]"),
    *[
        case
        for name in ("old_logprobs", "ref_logprobs")
        for case in (
            Case(f"{name}-by-sequence", to(torch.randn(B)), ValueError, (rf"{name} has shape \[2\]; expected \[B, T\] = \[2, 3\]",)),
            Case(f"{name}-column", to(torch.randn(B, 1)), ValueError, (rf"{name} has shape \[2, 1\]; expected",)),
            Case(f"{name}-with-prefix", to(torch.randn(B, T + 1)), ValueError, (rf"{name} has shape \[2, 4\]; expected",)),
            Case(f"{name}-padded", to(torch.randn(B, T)), ValueError, (rf"{name} has shape \[2, 3\]; expected \[N\] = \[6\]",), True),
        )
    ],
    Case("ref_logprobs-missing", to(None), ValueError, ("ref_logprobs is None; expected a tensor", "config.beta = 0.1", "set beta=0")),
    # mask
    Case("mask-list", lambda x: x["mask"].tolist(), TypeError, ("^mask is a list; expected a torch.Tensor", "Wrap it")),
    Case("mask-device", lambda x: x["mask"].to("meta"), ValueError, ("mask is on meta, logits are on cpu", "Move it")),
    Case("mask-sparse", lambda x: x["mask"].float().to_sparse(), TypeError, ("^mask has the layout torch.sparse_coo", "Convert it")),
    Case("mask-complex", lambda x: x["mask"].to(torch.complex64), TypeError, ("^mask has dtype torch.complex64; expected bool",)),
    Case("mask-by-sequence", to(torch.ones(B)), ValueError, (r"mask has shape \[2\]; expected the shape of token_ids = \[2, 3\]",)),
    Case("mask-with-prompt", to(torch.ones(B, T + 4)), ValueError, (r"mask has shape \[2, 7\]; expected",)),
    *[
        Case(
            f"mask-{value}",
            item_of("mask", (1, 0), value, torch.float32),
            ValueError,
            (rf"mask\[1, 0\] is {value}; expected bool, or numbers 0 and 1", "Compare first: mask > 0"),
        )
        for value in (0.5, -1.0, 2.0, NAN, INF)
    ],
    Case("mask-of-ints", lambda x: with_item((0, 1), 7)(x["mask"].int()), ValueError, (r"mask\[0, 1\] is 7; expected bool",)),
    # rollout_weights
    *of_every_tensor("rollout_weights", "[B, 1]"),
    Case(
        "rollout_weights-by-sequence", to(torch.rand(B)), ValueError, (r"rollout_weights has shape \[2\]; expected", r"\[B, 1\] = \[2, 1\]")
    ),
    Case("rollout_weights-number", to(1.0), TypeError, ("^rollout_weights is a float; expected a torch.Tensor",)),
    Case("rollout_weights-packed", to(torch.rand(2, 1)), ValueError, (r"rollout_weights has shape \[2, 1\]; expected \[N\]",), True),
    # temperature
    *[case for case in of_every_tensor("temperature", "[B]") if "list" not in case.name and "array" not in case.name],
    *[
        Case(
            f"temperature-{value!r}",
            to(value),
            ValueError,
            (f"temperature is {re.escape(repr(value))}; expected a finite number > 0", TEMPERATURE),
        )
        for value in (0, 0.0, -0.6, NAN, INF, -INF, 10**400)
    ],
    *[
        Case(f"temperature-number-{type(value).__name__}", to(value), TypeError, ("temperature is .*; expected a number > 0", TEMPERATURE))
        for value in (True, "0.6", None, [0.6], np.ones(B), 1j)
    ],
    *[
        Case(
            f"temperature-with-{value}",
            item_of("temperature", (1, 1), value),
            ValueError,
            (rf"temperature of token \[1, 1\] is {value}; expected a finite number > 0", TEMPERATURE),
        )
        for value in (0.0, -1.0, NAN, INF)
    ],
    Case("temperature-0d", to(torch.tensor(0.0)), ValueError, (r"temperature of token \[0, 0\] is 0.0; expected a finite number > 0",)),
    Case("temperature-0d-int", to(torch.tensor(1)), TypeError, ("temperature has dtype torch.int64; expected float32",)),
    Case("temperature-0d-device", to(torch.tensor(1.0, device="meta")), ValueError, ("temperature is on meta, logits are on cpu",)),
    Case(
        "temperature-by-sequence",
        to(torch.tensor([1.0, 0.0])),
        ValueError,
        (r"temperature of token \[1, 0\] is 0.0; expected a finite number",),
    ),
    Case("temperature-of-one", to(torch.ones(1)), ValueError, (r"temperature has shape \[1\]; expected",)),
    Case("temperature-packed", lambda x: with_item(3, NAN)(x["temperature"]), ValueError, (r"temperature of token \[3\] is nan",), True),
    # soft cap and logit scale
    *[
        Case(f"{name}-{value!r}", to(value), ValueError, (f"{name} is {re.escape(repr(value))}; expected a finite number > 0", fix))
        for name, fix in (("softcap", "Pass None for a model without"), ("logit_scale", "Pass 1.0 for a model that does not"))
        for value in (0, 0.0, -30.0, NAN, INF)
    ],
    *[
        Case(
            f"{name}-{type(value).__name__}",
            to(value),
            TypeError,
            (rf"{name} is .*\({type(value).__name__}\); expected a number > 0", fix),
        )
        for name, fix in (("softcap", "Pass None for a model without"), ("logit_scale", "Pass 1.0 for a model that does not"))
        for value in (True, "30", [30.0], torch.tensor(30.0))
    ],
    Case("logit_scale-none", to(None), TypeError, ("logit_scale is None .NoneType.; expected a number > 0", "Pass 1.0")),
]

CASES += [
    Case("support-lists", to([[1], [2]]), TypeError, ("support is a list; expected a grpo_fast.Support", "from_lists")),
    Case(
        "support-positions", to(gf.Support.unrestricted(5)), ValueError, ("support has 5 positions; expected 6", r"\[2, 3\]", "empty set")
    ),
    Case("support-id", to(gf.Support.from_lists([range(V + 1)] * (B * T))), ValueError, ("support holds the id 5; expected ids below 5",)),
    Case(
        "support-without-the-token",
        lambda given: gf.Support.from_lists([[(y + 1) % V] for y in given["token_ids"].clamp(min=0).flatten().tolist()]),
        ValueError,
        (r"token_ids\[\d, \d\] is \d, which is not among the 1 ids", "expected the sampled token in its set"),
    ),
]

LOSS_CASES: list[Case] = [
    # config
    Case("config-dict", to({"loss_type": "dapo"}), TypeError, ("config is a dict; expected a LossConfig", "for example")),
    Case("config-name", to("dapo"), TypeError, ("config is a str; expected a LossConfig",)),
    Case("config-none", to(None), TypeError, ("config is a NoneType; expected a LossConfig",)),
    Case("config-class", to(LossConfig), TypeError, ("config is a type; expected a LossConfig",)),
    # surrogate_inputs; those of a custom loss are in tests/test_custom_surrogate.py
    Case(
        "surrogate_inputs-unused",
        to({"mine": torch.rand(B)}),
        ValueError,
        ("surrogate_inputs has 'mine' with loss_type='dapo'; expected None", "Fix: LossConfig\\(loss_type='custom'"),
    ),
    # cu_seqlens
    *of_every_tensor("cu_seqlens", "[S + 1]", packed=True, floating=False)[:5],
    *[
        Case(
            f"cu_seqlens-{dtype}",
            converted("cu_seqlens", dtype),
            TypeError,
            (f"cu_seqlens has dtype {dtype}; expected torch.int32", r"Convert it: cu_seqlens.int\(\)"),
            True,
        )
        for dtype in (torch.float32, torch.bool, torch.int16)
    ],
    *[
        Case(
            f"cu_seqlens-{values}",
            to(torch.tensor(values, dtype=torch.int32)),
            ValueError,
            (rf"cu_seqlens is {re.escape(str(values))}; expected to begin with 0, never to decrease, and to end with N = 6",),
            True,
        )
        for values in ([0, 4], [0, 4, 7], [1, 4, 6], [0, 5, 4, 6], [0], [6], [-1, 6], [0, 4, 6, 6, 0])
    ],
    Case(
        "cu_seqlens-empty", to(torch.zeros(0, dtype=torch.int32)), ValueError, (r"cu_seqlens has shape \[0\]; expected \[S \+ 1\]",), True
    ),
    Case("cu_seqlens-2d", to(torch.zeros(1, 2, dtype=torch.int32)), ValueError, (r"cu_seqlens has shape \[1, 2\]; expected \[S",), True),
    Case(
        "cu_seqlens-padded",
        to(torch.tensor([0, 3], dtype=torch.int32)),
        ValueError,
        (r"cu_seqlens was given with token_ids of shape \[2, 3\]; expected packed input \[N\]", "Drop it"),
    ),
    *[
        Case(
            f"cu_seqlens-missing-{config.loss_type}-{config.level}-{config.resolved_aggregation}",
            to(None),
            ValueError,
            ("cu_seqlens is None; expected int32", f"loss_type='{config.loss_type}' needs the sequences", "or give a padded batch"),
            True,
            {"config": config},
        )
        for config in (
            LossConfig("grpo"),
            LossConfig("gspo"),
            LossConfig("vespo"),
            LossConfig("sapo"),
            LossConfig("luspo"),
            LossConfig("dr_grpo", max_completion_length=4),
            LossConfig("dapo", importance_sampling_level="sequence"),
            LossConfig("dapo", importance_sampling_level="sequence_token"),
            LossConfig("dapo", aggregation="sequence_sum"),
        )
    ],
    # num_items
    *[
        Case(
            f"num_items-{value!r}",
            to(value),
            ValueError,
            (f"num_items is {re.escape(repr(value))}; expected a finite number >= 0", "optimiser"),
        )
        for value in (-3, -0.5, NAN, INF)
    ],
    *[
        Case(
            f"num_items-{type(value).__name__}",
            to(value),
            TypeError,
            (r"num_items is .*; expected a number or a 0-d tensor", "optimiser step"),
        )
        for value in (True, "12", [12], np.array(12))
    ],
    *[
        Case(f"num_items-tensor-{value}", to(torch.tensor(value)), ValueError, (f"num_items is {value}; expected a finite number >= 0",))
        for value in (-3, -0.5, NAN, INF)
    ],
    Case(
        "num_items-1d", to(torch.tensor([3, 3])), ValueError, (r"num_items has shape \[2\]; expected one number", "Sum it over the batches")
    ),
    Case(
        "num_items-bool-tensor",
        to(torch.tensor(True)),
        TypeError,
        ("num_items has dtype torch.bool; expected an integer or floating-point",),
    ),
    Case("num_items-complex-tensor", to(torch.tensor(1j)), TypeError, ("num_items has dtype torch.complex64; expected an integer",)),
    Case("num_items-device", to(torch.tensor(3, device="meta")), ValueError, ("num_items is on meta, logits are on cpu", "Move it")),
    # loss_scale
    *[
        Case(f"loss_scale-{value!r}", to(value), ValueError, (f"loss_scale is {re.escape(repr(value))}; expected a finite number",))
        for value in (NAN, INF, -INF, 10**400)
    ],
    *[
        Case(
            f"loss_scale-{type(value).__name__}",
            to(value),
            TypeError,
            ("loss_scale is .*; expected a number", "Multiply the loss by a tensor"),
        )
        for value in (True, "1", None, torch.tensor(0.5), [0.5])
    ],
    # metrics_on and inplace
    *[
        Case(f"metrics_on-{value!r}", to(value), ValueError, (f"metrics_on is {re.escape(repr(value))}; expected 'all' or 'active'",))
        for value in ("some", "ALL", True, None, 1, ["all"])
    ],
    *[Case(f"inplace-{value!r}", to(value), TypeError, ("inplace is .*; expected True or False",)) for value in ("no", None, 1)],
]
SCORING = ("logits", "token_ids", "mask", "temperature", "softcap", "logit_scale", "support")  # what token_logprobs takes


def argument_of(case: Case) -> str:
    return next(
        name
        for name in (*right(True), "softcap", "logit_scale", "support", "surrogate_inputs", "num_items", "loss_scale", "metrics_on")
        if case.name.startswith(name + "-")
    )


def changed(case: Case) -> dict[str, Any]:
    arguments = {**right(case.packed), **case.also}
    value = case.change(arguments)
    if argument_of(case) == "logits" and isinstance(value, Tensor) and value.is_floating_point():
        value = value.detach().requires_grad_() * 1.0 if value.layout == torch.strided and value.dtype == torch.float32 else value
    return {**arguments, argument_of(case): value}


def bytes_of(x: Tensor) -> Tensor:
    return x.detach().reshape(-1).view(torch.uint8)


def assert_refused(case: Case, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """The error, its message, and no tensor written: not even the logits, though inplace=True allows it."""
    before = {
        name: (x, x._version, x.detach().clone())
        for name, x in arguments.items()
        if isinstance(x, Tensor) and x.layout == torch.strided and x.device.type == "cpu" and not x.is_nested
    }
    with pytest.raises(case.error) as caught:
        function(**arguments)
    assert type(caught.value) is case.error, "not a subclass that came from elsewhere"
    message = str(caught.value)
    assert re.search(".*".join(case.pieces), message, re.DOTALL), f"{case.pieces} not in: {message}"
    assert argument_of(case) in message or argument_of(case) == "logits"
    for name, (x, version, copy) in before.items():
        assert x._version == version, f"{name} was written"
        assert torch.equal(bytes_of(x), bytes_of(copy)), f"{name} was written"


@on_every_backend
@pytest.mark.parametrize("case", CASES + LOSS_CASES, ids=str)
def test_grpo_loss_refuses(case: Case, backend: str) -> None:
    with gf.use_backend(backend):
        assert_refused(case, gf.grpo_loss, changed(case))


@on_every_backend
@pytest.mark.parametrize("case", [case for case in CASES if argument_of(case) in SCORING], ids=str)
def test_token_logprobs_refuses(case: Case, backend: str) -> None:
    arguments = {name: value for name, value in changed(case).items() if name in SCORING}
    with gf.use_backend(backend):
        assert_refused(case, gf.token_logprobs, arguments)


@on_every_backend
@pytest.mark.parametrize("packed", [False, True])
def test_valid_arguments_are_accepted(packed: bool, backend: str) -> None:
    """The unchanged arguments are accepted, so that each case fails for its own reason; and inplace=True does write over their logits."""
    with gf.use_backend(backend):
        arguments = right(packed)
        logits, before = arguments["logits"], arguments["logits"].detach().clone()
        out = gf.grpo_loss(**arguments)
        assert out.loss.isfinite()
        assert torch.equal(logits.detach(), before) == (backend == "reference")
        fresh = right(packed)
        assert gf.token_logprobs(**{name: fresh[name] for name in SCORING if name in fresh}).logprobs.isfinite().all()


def keywords(function: Callable[..., Any]) -> set[str]:
    """The names of the keyword-only arguments."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY}


def test_every_argument_has_its_cases() -> None:
    named = {argument_of(case) for case in CASES + LOSS_CASES}
    arguments = keywords(gf.grpo_loss) | {"logits", "token_ids", "advantages"}
    named |= {"process_group", "impl"}  # torch.distributed checks the one, tests/test_cluster.py the other
    assert named == arguments
    assert {*keywords(gf.token_logprobs), "logits", "token_ids"} == {*SCORING, "process_group"}
    assert [name for name, count in Counter(case.name for case in CASES + LOSS_CASES).items() if count > 1] == [], "each has its own name"


# ---- writing over the logits


def leaf() -> Tensor:
    return torch.randn(B, T, V, requires_grad=True)


@on_every_backend
@pytest.mark.parametrize(
    ("logits", "pieces"),
    [
        (leaf, ("that are a leaf", "a parameter", "Leave inplace off")),
        (lambda: leaf()[:], ("or a view of one", "Leave inplace off")),
        (lambda: leaf().view(B, T, V), ("or a view of one", "Leave inplace off")),
        (lambda: torch.randn(B, T + 1, V, requires_grad=True)[:, :-1], ("or a view of one", "Leave inplace off")),
        (
            lambda: (torch.randn(1, T, V, requires_grad=True) * 1.0).expand(B, T, V),
            ("expanded", r"strides \(0, 5, 1\)", "Leave inplace off"),
        ),
        (
            lambda: (torch.randn(B, T, 1, requires_grad=True) * 1.0).expand(B, T, V),
            ("expanded", r"strides \(3, 1, 0\)", "Leave inplace off"),
        ),
        (lambda: (torch.randn(B, 7, requires_grad=True) * 1.0).unfold(1, V, 1), ("overlap", r"strides \(7, 1, 1\)", "Leave inplace off")),
    ],
    ids=["leaf", "view-of-leaf", "reshaped-leaf", "slice-of-leaf", "expanded-batch", "expanded-vocabulary", "overlapping"],
)
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_inplace_refuses_memory_that_is_not_its_own(
    logits: Callable[[], Tensor], pieces: tuple[str, ...], loss_type: str, backend: str
) -> None:
    z = logits()
    before = z.detach().clone()
    case = Case("inplace-", to(True), ValueError, ("inplace=True", *pieces))
    arguments = {**right(False), "logits": z, "config": LossConfig(loss_type)}
    with gf.use_backend(backend):
        assert_refused(case, gf.grpo_loss, arguments)
        assert torch.equal(z.detach(), before)
        out = gf.grpo_loss(**{**arguments, "inplace": False})  # the fix
    assert torch.autograd.grad(out.loss, z)[0].isfinite().all()
    assert torch.equal(z.detach(), before)


@on_every_backend
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "detached", "not_unit_stride"])
def test_inplace_writes_nothing_where_there_is_no_gradient_or_no_row(how: str, loss_type: str, backend: str) -> None:
    arguments = {**right(False), "config": LossConfig(loss_type)}
    if how == "detached":
        arguments["logits"] = arguments["logits"].detach()
    if how == "not_unit_stride":
        arguments["logits"] = (torch.randn(B, V, T, requires_grad=True) * 1.0).transpose(1, 2)
    logits, before = arguments["logits"], arguments["logits"].detach().clone()
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(how, torch.enable_grad)
    with gf.use_backend(backend), context():
        out = gf.grpo_loss(**arguments)
        if how == "not_unit_stride":
            out.loss.backward()
    assert torch.equal(logits.detach(), before)


@on_every_backend
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_inplace_marks_the_logits_as_modified_for_autograd(loss_type: str, backend: str) -> None:
    """exp saves its output for backward; a gradient written over it would be a wrong gradient, silently."""
    arguments = {**right(False), "config": LossConfig(loss_type)}
    arguments["logits"] = torch.randn(B, T, V, requires_grad=True).exp()
    with gf.use_backend(backend):
        loss = gf.grpo_loss(**arguments).loss
        if backend == "reference":  # computes elsewhere
            loss.backward()
            return
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# ---- what may be anything


@on_every_backend
@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "vespo"])
def test_under_a_zero_of_the_mask_no_value_is_wrong(loss_type: str, backend: str) -> None:
    arguments = right(False)
    arguments["mask"] = torch.tensor([[1, 1, 0], [0, 0, 0]])
    hidden = arguments["mask"] == 0
    arguments["token_ids"] = arguments["token_ids"].masked_fill(hidden, -100)
    arguments["token_ids"][1, 0] = 2**40
    arguments["temperature"] = arguments["temperature"].masked_fill(hidden, NAN)
    arguments["temperature"][1, 1:] = torch.tensor([0.0, -1.0])
    arguments["logits"] = arguments["logits"].detach().masked_fill(hidden.unsqueeze(-1), NAN).requires_grad_()
    for name in ("old_logprobs", "ref_logprobs", "rollout_weights"):
        arguments[name] = arguments[name].masked_fill(hidden, NAN)
    with gf.use_backend(backend):
        out = gf.grpo_loss(**{**arguments, "config": LossConfig(loss_type, beta=0.1), "inplace": False})
        out.loss.backward()
        statistics = gf.token_logprobs(**{name: arguments[name] for name in SCORING if name in arguments})
    assert out.loss.isfinite()
    assert arguments["logits"].grad.isfinite().all()
    assert statistics.logprobs.isfinite().all()


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_mask_of_zeros_and_ones_of_any_type(dtype: torch.dtype, backend: str) -> None:
    arguments = {**right(False), "inplace": False}
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    with gf.use_backend(backend):
        expected = gf.grpo_loss(**{**arguments, "mask": mask.bool()}).loss
        assert torch.equal(gf.grpo_loss(**{**arguments, "mask": mask.to(dtype)}).loss, expected)


@on_every_backend
@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "vespo", "sapo"])
@pytest.mark.parametrize("name", ["advantages", "old_logprobs", "ref_logprobs", "rollout_weights", "temperature", "0-d temperature"])
def test_all_but_the_logits_are_constants(name: str, loss_type: str, backend: str) -> None:
    """No gradient flows into arguments that require one, as the log-probabilities of a reference model without no_grad do."""
    arguments = {**right(False), "inplace": False, "config": LossConfig(loss_type, beta=0.1, bias_corrected_kl=True)}
    if name == "0-d temperature":
        name, arguments["temperature"] = "temperature", torch.tensor(0.7)
    with gf.use_backend(backend):
        (expected,) = torch.autograd.grad(gf.grpo_loss(**arguments).loss, arguments["logits"])
        constant = arguments[name].clone().requires_grad_()
        loss = gf.grpo_loss(**{**arguments, name: constant}).loss
        (gradient, other) = torch.autograd.grad(loss, (arguments["logits"], constant), allow_unused=True)
    assert other is None
    assert torch.equal(gradient, expected)


@on_every_backend
def test_no_token_at_all_counts_in_the_whole_step(backend: str) -> None:
    """num_items may be 0: a step in which every completion was truncated has no loss and raises no error."""
    arguments = {**right(False), "inplace": False, "mask": torch.zeros(B, T)}
    with gf.use_backend(backend):
        for nothing in (0, 0.0, torch.tensor(0)):
            assert gf.grpo_loss(**arguments, num_items=nothing).loss == 0


@on_every_backend
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("advantages", NAN),
        ("advantages", INF),
        ("advantages", -INF),
        ("old_logprobs", NAN),
        ("ref_logprobs", NAN),
        ("rollout_weights", NAN),
        ("rollout_weights", INF),
    ],
)
def test_a_value_that_would_make_the_loss_nan(name: str, value: float, packed: bool, backend: str) -> None:
    where = (1,) if packed or name == "advantages" else (1, 2)
    case = Case(f"{name}-", lambda x: with_item(where, value)(x[name]), ValueError, (f"{name} of token ", f"is {value}; expected"), packed)
    arguments = changed(case)
    with gf.use_backend(backend):
        assert_refused(case, gf.grpo_loss, arguments)
        masked = {**arguments, "inplace": False, "mask": arguments["mask"].clone()}
        masked["mask"][1 if name == "advantages" else where] = False
        assert gf.grpo_loss(**masked).loss.isfinite()


@on_every_backend
@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "sapo"])
def test_a_token_that_the_sampler_could_not_have_drawn(loss_type: str, backend: str) -> None:
    """The log-ratio is clamped, and a sum of finite values that overflows raises no error."""
    arguments = {**right(False), "inplace": False, "config": LossConfig(loss_type)}
    arguments["old_logprobs"][0, 1], arguments["old_logprobs"][1, 1] = -INF, -3e38
    arguments["rollout_weights"] = arguments["rollout_weights"].double() * 0 + 1e-3
    arguments["advantages"] = torch.tensor([6e4, 6e4], dtype=torch.float16)
    with gf.use_backend(backend):
        assert gf.grpo_loss(**arguments).loss.isfinite()


def test_numbers_of_numpy_are_numbers() -> None:
    arguments = {**right(False), "inplace": False}
    plain = {"temperature": 0.5, "softcap": 30.0, "logit_scale": 2.0, "num_items": 6, "loss_scale": 0.25}
    expected = gf.grpo_loss(**{**arguments, **plain}).loss
    for kind in (np.float32, np.float64):
        given = {name: kind(value) for name, value in plain.items()}
        assert torch.equal(gf.grpo_loss(**{**arguments, **given, "num_items": np.int64(6)}).loss, expected)


@pytest.mark.parametrize("what", ["grpo_loss", "token_logprobs"])
def test_tensors_without_values(what: str) -> None:
    logits, ids = torch.randn(B, T, V, device="meta"), torch.zeros(B, T, dtype=torch.long, device="meta")
    rest = (torch.randn(B, device="meta"),) if what == "grpo_loss" else ()
    with pytest.raises(ValueError, match="logits are on meta, which holds no values; expected tensors on a CPU or a GPU"):
        getattr(gf, what)(logits, ids, *rest)


def test_debug_checks_do_not_change_the_cpu() -> None:
    """Value checks always run there."""
    case = next(case for case in CASES if case.name == "token_ids--1")
    for enabled in (True, False):
        with gf.debug_checks(enabled):
            assert_refused(case, gf.grpo_loss, changed(case))
