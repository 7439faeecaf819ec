"""Sends weights to a running vLLM server: over NCCL with vLLM's own transfer engine, or through a folder that both sides see."""

from __future__ import annotations

import logging
import reprlib
import shutil
import tempfile
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from grpo_fast.generation.merged_weights import merged_state_dict
from grpo_fast.generation.protocol import SamplerError
from grpo_fast.generation.vllm_answer import is_count
from grpo_fast.generation.vllm_http import NotServedError, ServerClient
from grpo_fast.models.unwrap import inner_model, is_peft, is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["WEIGHT_SYNCS", "DiskSync", "NCCLSync", "NoSync", "WeightSync", "make_weight_sync", "run_on_first"]

logger = logging.getLogger("grpo_fast")
T = TypeVar("T")
SHUTDOWN_SECONDS = 30.0  # to leave the NCCL group; workers that hang in a transfer do not answer
WEIGHT_SYNCS = ("auto", "nccl", "disk", "none")


class WeightSync(Protocol):
    """A way to send weights to the server."""

    def send(self, model: PreTrainedModel | nn.Module, step: int) -> None:
        """Send the model's weights. Every process must call it."""

    def close(self) -> None:
        """Release resources."""


def make_weight_sync(
    name: str, server: ServerClient, model: PreTrainedModel | nn.Module, *, weights_dir: str | None, nccl_address: str, nccl_port: int
) -> NoSync | DiskSync | NCCLSync:
    """Make the WeightSync of this name; "auto" is NCCL if the model is on a GPU and vllm can be imported, else a folder.

    Raises:
        ValueError: the name is unknown, or the model cannot be sent this way.
        SamplerError: vllm is not installed, which NCCL needs.
    """
    if name not in WEIGHT_SYNCS:
        raise ValueError(f"weight_sync is {name!r}; expected one of {', '.join(WEIGHT_SYNCS)}.")
    if name == "auto":
        on_gpu = any(parameter.is_cuda for parameter in model.parameters())
        name = "nccl" if on_gpu and weights_dir is None and not is_peft(model) and find_spec("vllm") is not None else "disk"
    if name == "none":
        return NoSync()
    if name == "disk":
        return DiskSync(server, weights_dir)
    return NCCLSync(server, model, nccl_address, nccl_port)


class NoSync:
    """Sends nothing: for evaluations, or if something else updates the server's weights."""

    def send(self, model: PreTrainedModel | nn.Module, step: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class DiskSync:
    """Writes a checkpoint to a folder and lets vLLM's workers read it (``reload_weights`` through /collective_rpc).

    The server must see the folder under the same path. A temporary folder holds the weights only until the server has read them, because
    it is in memory (/dev/shm) where that exists. In a folder that the caller gave, those of the last step remain until `close`.

    Args:
        server: the server.
        directory: where to make the folders; None = a new temporary folder, which is removed by `close`, or when this object is collected,
            or when the interpreter ends.
    """

    def __init__(self, server: ServerClient, directory: str | None) -> None:
        self.server = server
        self._temporary = directory is None
        self._directory = None if directory is None else Path(directory)
        self._last: Path | None = None
        self._remove: weakref.finalize[..., DiskSync] | None = None  # of the temporary folder

    def send(self, model: PreTrainedModel | nn.Module, step: int) -> None:
        """Write the weights, and let the server read them."""
        first = _rank() == 0
        state = merged_state_dict(model) if first or is_sharded(model) else {}  # gathering sharded weights needs every process
        _run_on_all(lambda: self._send(model, state, step) if first else None)

    def _send(self, model: PreTrainedModel | nn.Module, state: dict[str, Tensor], step: int) -> None:
        folder, loaded = self._folder() / f"step-{step}", False
        try:
            inner_model(model).save_pretrained(folder, state_dict=state, safe_serialization=True)
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            try:
                self.server.post("/collective_rpc", body, repeatable=False)
            except NotServedError:
                raise
            except SamplerError as error:
                fix = f"If it cannot read {folder.parent}: a weights_dir that both sides see under the same path, or weight_sync 'nccl'."
                raise type(error)(f"{error} {fix}") from error
            loaded = True
        except OSError as error:
            raise SamplerError(
                f"weights_dir {folder.parent}: the weights cannot be written ({error}). Fix: another weights_dir."
            ) from error
        finally:
            if self._temporary or not loaded:
                shutil.rmtree(folder, ignore_errors=True)
        _reset_prefix_cache(self.server)
        if self._last is not None and self._last != folder:
            shutil.rmtree(self._last, ignore_errors=True)
        self._last = folder

    def close(self) -> None:
        """Remove the weights; a folder that the caller has given is emptied of them, but not removed."""
        if self._remove is not None:
            self._remove()
            self._remove = self._directory = None
        elif self._last is not None:
            shutil.rmtree(self._last, ignore_errors=True)
        self._last = None

    def _folder(self) -> Path:
        if self._directory is None:
            memory = Path("/dev/shm")
            self._directory = Path(tempfile.mkdtemp(prefix="grpo_fast-weights-", dir=memory if memory.is_dir() else None))
            self._remove = weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        return self._directory


class NCCLSync:
    """Sends weights from this process's GPU to the server's workers with vLLM's weight transfer engine (vLLM documentation, "Weight
    Transfer").

    The vllm package must be installed here too: its engine opens the NCCL group, packs the tensors and calls the server's endpoints.

    Args:
        server: the server.
        model: the model that is trained.
        address, port: where this process listens for the server's workers.

    Raises:
        ValueError: the model has an adapter, whose parameters are not those of the model on the server.
        SamplerError: vllm is not installed.
    """

    def __init__(self, server: ServerClient, model: PreTrainedModel | nn.Module, address: str, port: int) -> None:
        if is_peft(model):
            raise ValueError(
                "weight_sync 'nccl' sends the parameters as they are, and an adapter's are not the model's. Fix: weight_sync 'disk'."
            )
        if find_spec("vllm") is None:
            raise SamplerError("weight_sync 'nccl' needs the package vllm here as well. Fix: pip install vllm, or weight_sync 'disk'.")
        self.server, self.address, self.port = server, address, port
        self._engine: Any = None  # of vllm, which is optional
        self._disconnect: weakref.finalize[..., NCCLSync] | None = None

    def send(self, model: PreTrainedModel | nn.Module, step: int) -> None:
        """Send the weights; the first call connects to the server's workers. After an error the next call connects again."""
        try:
            _run_on_all(lambda: self._send(inner_model(model)))
        except SamplerError:
            self.close()  # a group in which a transfer has failed cannot be used again
            raise

    def _send(self, model: PreTrainedModel) -> None:
        first = _rank() == 0
        try:
            if self._engine is None:
                self._engine = self._connect(model)
                self._disconnect = weakref.finalize(self, _shut_down, self._engine, self.server if first else None)
            self._engine.send_weights()
        except SamplerError:
            raise
        except Exception as error:  # of NCCL, torch or requests
            raise SamplerError(
                f"weight_sync 'nccl': the weights could not be sent to {self.server.url} ({type(error).__name__}: {error}). Fix: see the "
                f"server's log; its workers must reach this process at nccl_address {self.address}, nccl_port {self.port}, and it needs "
                """--weight-transfer-config '{"backend": "nccl"}'. Or weight_sync 'disk'."""
            ) from error
        if first:
            _reset_prefix_cache(self.server)

    def close(self) -> None:
        """Leave the NCCL group, here and in the server's workers. It also happens when this object is collected or the interpreter ends."""
        if self._disconnect is not None:
            self._disconnect()
        self._engine = self._disconnect = None

    def _connect(self, model: PreTrainedModel) -> Any:
        try:
            from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, ModuleSource, WeightTransferTrainerFactory
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        except ImportError as error:
            raise SamplerError(
                f"weight_sync 'nccl': this vllm has no weight transfer engine for trainers ({error}). "
                "Fix: a newer vllm, or weight_sync 'disk'."
            ) from error
        answer = self.server.get("/get_world_size")
        workers = answer.get("world_size") if isinstance(answer, dict) else None
        if not is_count(workers) or not 0 < workers < 1 << 20:
            found = reprlib.repr(answer)
            raise SamplerError(f"GET {self.server.url}/get_world_size: {found}; expected the number of workers. Is this a vLLM server?")
        info = NCCLTrainerInitInfo(master_address=self.address, master_port=self.port, world_size=workers + 1, rank=_rank(), packed=True)
        client = HTTPVLLMWeightSyncClient(self.server.url)
        return WeightTransferTrainerFactory.trainer_init(init_info=info, client=client, source=ModuleSource(model))


def _reset_prefix_cache(server: ServerClient) -> None:
    """Let the server forget keys and values, which belong to the older weights.

    Raises:
        SamplerError: it says that it has not.
    """
    path = "/reset_prefix_cache?reset_running_requests=true"
    answer = server.post(path, {}, repeatable=False)
    if isinstance(answer, dict) and answer.get("success") is False:
        raise SamplerError(
            f"POST {server.url}{path}: the server keeps its prefix cache, which belongs to older weights. Fix: stop other requests to it, "
            "or vllm serve --no-enable-prefix-caching."
        )


def _shut_down(engine: Any, server: ServerClient | None) -> None:
    """Shut a weight transfer engine down on both sides. A server that is gone already has left the group by that."""
    if server is not None:
        try:
            path = "/shutdown_weight_transfer_engine"
            server.post(path, {}, repeatable=False, retry_seconds=0.0, timeout=SHUTDOWN_SECONDS)
        except SamplerError as error:
            logger.warning("The server did not shut its weight transfer engine down: %s", error)
    if hasattr(engine, "shutdown"):
        engine.shutdown()


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _rank() -> int:
    return torch.distributed.get_rank() if _distributed() else 0


def _run_on_all(act: Callable[[], object]) -> None:
    """Call ``act`` in every process and wait for all. If it fails in the first, all processes raise, so that none waits for it forever."""
    failure: SamplerError | None = None
    try:
        act()
    except SamplerError as error:
        failure = error
    if _distributed():
        failures = [failure]
        torch.distributed.broadcast_object_list(failures, src=0)
        if failure is None and failures[0] is not None:
            failure = type(failures[0])(f"process 0: {failures[0]}")
    if failure is not None:
        raise failure


def run_on_first(act: Callable[[], T]) -> T:
    """Call ``act`` in the first process, and return its result in all; if it fails, all raise."""
    results: list[T | None] = [None]

    def run() -> None:
        if _rank() == 0:
            results[0] = act()

    _run_on_all(run)
    if _distributed():
        torch.distributed.broadcast_object_list(results, src=0)
    return cast("T", results[0])
