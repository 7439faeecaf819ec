"""Names the weights on a vLLM server, so that completions drawn under other weights are noticed."""

from __future__ import annotations

import reprlib
import uuid
from typing import TYPE_CHECKING

from torch import nn

from grpo_fast.generation.protocol import SamplerError, WeightsLostError
from grpo_fast.generation.vllm_http import NotServedError, ServerClient
from grpo_fast.generation.vllm_model_check import check_model
from grpo_fast.generation.vllm_weights import run_on_first

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["WeightVersions"]


class WeightVersions:
    """The version of the weights that were sent last, and whether the server still has them.

    Each update gets a name of its own (``/update_weight_version`` of vLLM 0.32). A server that was restarted does not know it, and one
    that got weights from somebody else has another. So if the name is still in force after completions were drawn (``/weight_info``),
    none of them was drawn under other weights. For a server without names, a lost connection counts as a restart.

    Args:
        server: the server.
        enabled: False if nothing is sent, so that there is nothing to compare.
    """

    def __init__(self, server: ServerClient, *, enabled: bool) -> None:
        self.server, self.enabled = server, enabled
        self.named = False  # whether the server can name its weights
        self._version: str | None = None  # in force; None before the first update
        self._lost_connections = 0  # at the last update
        if enabled:
            try:
                self._current()
                self.named = True
            except NotServedError:
                pass

    def begin(self, model: PreTrainedModel | nn.Module, step: int) -> tuple[str, bool]:
        """Before weights are sent. Every process must call it.

        The name is set first: weights sent to a server that is restarted in between then have no name, instead of a wrong one.

        Returns:
            The name for `finish`, and whether the server is still the one that has the last weights.

        Raises:
            SamplerError: the server has a model of other sizes.
        """
        before, self._version = self._version, "an update that has not finished"

        def name() -> tuple[str, bool]:
            version = f"grpo_fast-{step}-{uuid.uuid4().hex}"
            same = before is None or self._unchanged(before)
            if before is None or not same:
                check_model(self.server, model)
            if self.named:
                self.server.post("/update_weight_version", {"new_version": version})
            return version, same

        return run_on_first(name)

    def finish(self, version: str) -> None:
        """After weights have been sent under this name."""
        self._version, self._lost_connections = version, self.server.lost_connections

    def check(self) -> None:
        """After completions were drawn.

        Raises:
            WeightsLostError: some may have been drawn under other weights than those sent last.
        """
        if not self.enabled or self._version is None:
            return
        if self.named:
            found = self._current()
            if found != self._version:
                raise WeightsLostError(
                    f"{self.server.url}: the server has the weights {found!r}; expected {self._version!r}, which were sent last. Was it "
                    "restarted, or does something else write its weights? The completions are not used."
                )
        elif self.server.lost_connections != self._lost_connections:
            raise WeightsLostError(
                f"{self.server.url}: a connection was lost since the weights were sent, and the server, an older vLLM, cannot tell whether "
                "it was restarted. The completions are not used."
            )

    def _unchanged(self, version: str) -> bool:
        """Whether the server is still the one that got these weights."""
        return self._current() == version if self.named else self.server.lost_connections == self._lost_connections

    def _current(self) -> str:
        answer = self.server.get("/weight_info")
        version = answer.get("weight_version") if isinstance(answer, dict) else None
        if not isinstance(version, str):
            raise SamplerError(
                f"GET {self.server.url}/weight_info: {reprlib.repr(answer)}; expected a weight_version. Is it a vLLM server?"
            )
        return version
