"""Kept sets from the replies of inference servers: gf.Support's constructors for them, and the parser of SGLang's replies."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

pytest.importorskip("transformers", reason="grpo_fast.generation needs it")

import grpo_fast as gf
from grpo_fast.generation import SamplerError, completion_from_sglang
from grpo_fast.loss.reported_sets import IncompleteSetError

NEVER = -math.inf
HALF, QUARTER = math.log(0.5), math.log(0.25)


def lists(support: gf.Support | None) -> list[list[int]]:
    assert support is not None
    bounds, ids = support.offsets.tolist(), support.token_ids.tolist()
    return [ids[begin:end] for begin, end in itertools.pairwise(bounds)]


def test_from_a_sampling_mask() -> None:
    build = gf.Support.from_sampling_mask
    assert lists(build([[3, 1], [2], [0, 1, 2, 3]], [1, 2, 0], vocab_size=4)) == [[3, 1], [2], []]  # the whole vocabulary: no restriction
    assert lists(build([[3, 1], [0, 1, 2, 3]], [1, 0])) == [[3, 1], [0, 1, 2, 3]]  # of a vocabulary of unknown size
    assert len(build([], [])) == 0


@pytest.mark.parametrize(
    ("mask", "kind", "message"),
    [
        ([[1, 2]], ValueError, "sampling_mask has 1 entries for 2 sampled tokens"),
        (None, TypeError, "sampling_mask is None; expected a list"),
        ("ab", TypeError, "sampling_mask is 'ab'; expected a list"),
        ([[1], None], TypeError, r"sampling_mask\[1\] is None; expected a list"),
        ([[1], "2"], TypeError, r"sampling_mask\[1\] is '2'; expected a list"),
        ([[1], []], ValueError, r"sampling_mask\[1\] is empty; expected at least the sampled token"),
        ([[1], [2, 4]], ValueError, r"sampling_mask\[1\] holds id 4; expected 0 <= id < 4"),
        ([[1], [2, -1]], ValueError, r"sampling_mask\[1\] holds id -1; expected 0 <= id < 4"),
        ([[1], [2, 1 << 70]], ValueError, "expected 0 <= id < 4"),
        ([[1], [2, 3, 3]], ValueError, r"sampling_mask\[1\] holds 3 ids, of which 2 are different"),
        ([[1], [2, True]], TypeError, r"sampling_mask\[1\] holds True; expected integer"),
        ([[1], [2, 3.0]], TypeError, r"sampling_mask\[1\] holds 3\.0; expected integer"),
        ([[1], [3, 0]], ValueError, r"sampling_mask\[1\] has 2 ids, and the sampled token 2 is not among them"),
    ],
)
def test_no_sampling_mask_is_believed(mask: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        gf.Support.from_sampling_mask(mask, [1, 2], vocab_size=4)


def test_from_top_logprobs() -> None:
    build = gf.Support.from_top_logprobs
    assert lists(build([{5: HALF, 2: HALF, 7: NEVER}], [2], requested=3)) == [[5, 2]]
    assert lists(build([{5: HALF, 2: HALF, 7: -9999.0}], [2], requested=3)) == [[5, 2]]  # vLLM's -inf
    assert lists(build([{5: HALF, 2: HALF}], [2], requested=3)) == [[5, 2]]  # fewer than requested
    assert lists(build([{5: 0.0}], [5], requested=2)) == [[5]]
    assert lists(build([{0: HALF, 1: QUARTER, 2: QUARTER}], [2], requested=3, vocab_size=3)) == [[]]  # all tokens have a probability


@pytest.mark.parametrize("tops", [{5: HALF, 2: QUARTER}, {5: HALF, 2: QUARTER, 7: QUARTER}, {5: 0.0, 2: -40.0}])
def test_a_set_that_may_be_larger_is_not_taken_as_complete(tops: dict[int, float]) -> None:
    """The third has all probability that float32 can show in its first token."""
    with pytest.raises(IncompleteSetError, match=r"top_logprobs\[0\] has . tokens, 2 were requested.*the set may have more"):
        gf.Support.from_top_logprobs([tops], [5], requested=2, vocab_size=9)


@pytest.mark.parametrize(
    ("tops", "kind", "message"),
    [
        ([], ValueError, "top_logprobs has 0 entries for 1 sampled tokens"),
        ({}, TypeError, r"top_logprobs is \{\}; expected a list"),
        ([None], TypeError, r"top_logprobs\[0\] is None; expected log-probabilities by token id"),
        ([{5: "-1"}], TypeError, r"has the log-probability '-1' for token 5; expected a number"),
        ([{5: True}], TypeError, r"has the log-probability True for token 5"),
        ([{5: math.nan}], ValueError, "has the log-probability nan for token 5; expected at most 0"),
        ([{5: 0.5, 7: NEVER}], ValueError, r"has the log-probability 0\.5 for token 5; expected at most 0"),
        ([{5: HALF, 2: HALF, 7: NEVER}], ValueError, "the sampled token 3 is not among them"),
        ([{3: HALF, 9: HALF, 7: NEVER}], ValueError, "holds id 9; expected 0 <= id < 9"),
        ([{3: HALF, "4": HALF, 7: NEVER}], TypeError, "holds '4'; expected integer"),
        ([{3: HALF, 2: QUARTER, 7: NEVER}], ValueError, r"probabilities of the 2 tokens sum to 0\.75; expected 1"),
        ([{3: NEVER, 7: NEVER}], ValueError, "sum to 0; expected 1"),
    ],
)
def test_no_top_logprobs_are_believed(tops: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        gf.Support.from_top_logprobs(tops, [3], requested=3, vocab_size=9)


# --- SGLang ----------------------------------------------------------------------------------------------------------------------------


def reply(**changes: Any) -> dict[str, Any]:
    """Two tokens, 5 and 2, as SGLang returns them with return_sampling_mask and return_logprob."""
    meta: dict[str, Any] = {
        "id": "a",
        "finish_reason": {"type": "length", "length": 2},
        "completion_tokens": 2,
        "output_token_logprobs": [[-1.1, 5, None], [-0.4, 2, None]],
        "output_token_sampling_mask": [[5, 7], [2]],
        "output_token_sampling_mask_length": 2,
        "output_token_sampling_logprobs": [HALF, 0.0],
    }
    top = {name: changes.pop(name) for name in ("output_ids",) if name in changes}
    meta = {name: value for name, value in (meta | changes).items() if value is not ...}
    return {"text": "", "output_ids": [5, 2], "meta_info": meta, **top}


def test_a_reply_of_sglang() -> None:
    found = completion_from_sglang(reply(), vocab_size=9)
    assert found.token_ids == [5, 2] and not found.finished and found.logprobs == [HALF, 0.0]
    assert lists(found.support) == [[5, 7], [2]]
    over_sets = [[math.log(0.3), math.log(0.7)], [0.0]]
    found = completion_from_sglang(reply(output_token_sampling_logprobs=over_sets, finish_reason={"type": "stop", "matched": 2}))
    assert found.finished and found.logprobs == [math.log(0.3), 0.0] and lists(found.support) == [[5, 7], [2]]
    greedy = completion_from_sglang(reply(output_token_sampling_mask=...), greedy=True)
    assert greedy.token_ids == [5, 2] and greedy.logprobs is None and greedy.support is None


def test_top_logprobs_of_sglang_must_show_the_whole_set() -> None:
    tops: list[Any] = [[[HALF, 5, "a"], [HALF, 7, None], [NEVER, 1, None]], [[0.0, 2, None], [NEVER, 3, None], [NEVER, 4, None]]]
    found = completion_from_sglang(reply(output_token_sampling_mask=..., output_top_logprobs=tops), top_logprobs_num=3)
    assert lists(found.support) == [[5, 7], [2]] and found.logprobs == [-1.1, -0.4]
    tops[0][2][0] = -9.0  # before truncation, as SGLang computes them
    with pytest.raises(SamplerError, match=r'the set may have more.*Fix: request "return_sampling_mask": true'):
        completion_from_sglang(reply(output_token_sampling_mask=..., output_top_logprobs=tops), top_logprobs_num=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finish_reason": {"type": "abort", "message": "x"}}, "finish_reason is .*expected the type 'stop' or 'length'"),
        ({"finish_reason": None}, "finish_reason is None"),
        ({"output_token_logprobs": ...}, "output_token_logprobs is None; expected a list"),
        ({"output_token_logprobs": [[-1.1], [-0.4]]}, r"expected a list of \[log-probability, token id, text\]"),
        ({"output_ids": [5, 3]}, r"output_ids are \[5, 3\], output_token_logprobs of \[5, 2\]; expected the same"),
        ({"output_token_logprobs": [[-1.1, 9, None], [-0.4, 2, None]], "output_ids": [9, 2]}, "holds id 9; expected 0 <= id < 9"),
        ({"output_token_logprobs": [[-1.1, [5], None], [-0.4, 2, None]], "output_ids": [[5], 2]}, r"holds \[5\]; expected integer"),
        ({"output_token_sampling_mask": ...}, "no output_token_sampling_mask; .*Fix: request"),
        ({"output_token_sampling_mask": [[5, 7]]}, "sampling_mask has 1 entries for 2"),
        ({"output_token_sampling_mask": [[5, -7], [2]]}, "holds id -7"),
        ({"output_token_sampling_mask": [[5, 9], [2]]}, "holds id 9"),
        ({"output_token_sampling_mask": [[7], [2]]}, "the sampled token 5 is not among them"),
        ({"output_token_sampling_logprobs": [HALF]}, "expected one entry for each of the 2 tokens"),
        ({"output_token_sampling_logprobs": [HALF, None]}, "log-probability of token 1 is None; expected a finite number"),
        ({"output_token_sampling_logprobs": [HALF, NEVER]}, "log-probability of token 1 is -inf; expected a finite number"),
        ({"output_token_sampling_logprobs": [[HALF], [0.0]]}, "expected a log-probability for each of the 2 ids of its set"),
        ({"output_token_sampling_logprobs": [[HALF, QUARTER], [0.0]]}, r"sum to 0\.75; expected 1"),
    ],
)
def test_no_reply_of_sglang_is_believed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplerError, match=f"SGLang's reply: .*{message}"):
        completion_from_sglang(reply(**changes), vocab_size=9)


@pytest.mark.parametrize("given", [None, [], "a", {"meta_info": None}, {"meta_info": []}])
def test_what_is_no_reply_of_sglang(given: Any) -> None:
    with pytest.raises(SamplerError, match="finish_reason is None"):
        completion_from_sglang(given)
