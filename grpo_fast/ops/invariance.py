"""The switch for batch invariance: the fused head's results do not depend on the other tokens of a call."""

from __future__ import annotations

from grpo_fast.ops.switch import Switch

__all__ = ["batch_invariant", "is_batch_invariant"]


# A module global and not a context variable: torch.compile guards on it, so that a compiled function follows batch_invariant.
_enabled = False


class batch_invariant(Switch[bool]):  # noqa: N801  (a function to its callers, like torch.set_grad_enabled)
    """Compute the fused head so that a token's log-probability, entropy and gradient have the same bits in every call.

    They then do not depend on the other tokens of the call and their order, on padding, packing, masks and ``chunk_bytes``, nor, on a CPU,
    on the number of threads. The gradient of the weight has the same bits for every padding, packing and ``chunk_bytes``, as long as the
    tokens are in the same order. On a CPU the products are those of the C++ extension. Elsewhere every product has the same shape, and the
    bits are as fixed as those of the vendor's product of one shape. docs/numerics.md states the price. Over logits the functions are batch
    invariant without this.

    The call takes effect immediately. As a statement it holds until the next call; in a ``with`` it holds until the end of the block. As a
    decorator it holds while the function runs. It can be nested, and holds for every thread of the process.

    Args:
        enabled: False: turn it off.

    Raises:
        TypeError: enabled is not a bool.

    Example:
        >>> with batch_invariant():
        ...     is_batch_invariant()
        True
    """

    def __init__(self, enabled: bool = True) -> None:
        if not isinstance(enabled, bool):
            raise TypeError(
                f"batch_invariant: enabled is {enabled!r} ({type(enabled).__name__}); expected a bool. Fix: as a decorator it is called "
                "too, @batch_invariant()."
            )
        super().__init__(enabled)

    @staticmethod
    def current() -> bool:
        return _enabled

    @staticmethod
    def put(value: bool) -> None:
        _set(value)


def _set(enabled: bool) -> None:
    global _enabled
    _enabled = enabled


def is_batch_invariant() -> bool:
    """Return whether batch_invariant is in force."""
    return _enabled
