"""New weights for a running vLLM server: over NCCL by vLLM's own transfer engine, or through a folder that both sides see."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from grpo_fast.generation.protocol import SamplerError
from grpo_fast.generation.vllm_http import Server
from grpo_fast.models.unwrap import inner_model, is_peft, is_sharded, without_wrappers

__all__ = ["WEIGHT_SYNCS", "WeightSync", "make_weight_sync", "merged_state_dict"]

WEIGHT_SYNCS = ("auto", "nccl", "disk", "none")


class WeightSync(Protocol):
    def send(self, model: Any, step: int) -> None: ...
    def close(self) -> None: ...


def make_weight_sync(
    name: str, server: Server, model: Any, *, weights_dir: str | None, nccl_address: str, nccl_port: int
) -> NoSync | DiskSync | NCCLSync:
    """The way of that name; "auto": over NCCL where the model is on a GPU and vllm can be imported, else through a folder."""
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
    """The server keeps the weights it was started with: to evaluate, or where something else updates it."""

    def send(self, model: Any, step: int) -> None:
        """Nothing is sent."""

    def close(self) -> None:
        """There is nothing to close."""


class DiskSync:
    """A checkpoint in a folder, and the word to read it: ``reload_weights`` of vLLM's workers, by its /collective_rpc.

    The folder has to be seen by the server under the same path. In memory (/dev/shm, the default) this costs two copies of the weights;
    over a network file system as long as that takes. The folder of the step before is removed when the new one is in force.
    """

    def __init__(self, server: Server, directory: str | None) -> None:
        self.server = server
        self._own = directory is None
        self._directory = None if directory is None else Path(directory)
        self._last: Path | None = None

    def send(self, model: Any, step: int) -> None:
        first = _rank() == 0
        state = merged_state_dict(model) if first or is_sharded(model) else {}  # what is sharded is gathered with the others' help
        _together(lambda: self._send(model, state, step) if first else None)

    def _send(self, model: Any, state: dict[str, Tensor], step: int) -> None:
        folder = self._folder() / f"step-{step}"
        try:
            inner_model(model).save_pretrained(folder, state_dict=state, safe_serialization=True)
        except OSError as error:
            raise SamplerError(
                f"weights_dir {folder.parent}: the weights cannot be written ({error}). Cure: weights_dir elsewhere."
            ) from error
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self.server.post("/collective_rpc", body, repeatable=False)
        self.server.post("/reset_prefix_cache?reset_running_requests=true", {}, repeatable=False)  # keys and values of older weights
        if self._last is not None and self._last != folder:
            shutil.rmtree(self._last, ignore_errors=True)
        self._last = folder

    def close(self) -> None:
        if self._own and self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _folder(self) -> Path:
        if self._directory is None:
            memory = Path("/dev/shm")
            self._directory = Path(tempfile.mkdtemp(prefix="grpo_fast-weights-", dir=memory if memory.is_dir() else None))
        return self._directory


class NCCLSync:
    """From this process's GPU to the server's workers, by vLLM's weight transfer engine (vLLM documentation, "Weight Transfer").

    vLLM's package has to be installed here too: its engine opens the NCCL group, packs the tensors and drives the server's four phases.
    """

    def __init__(self, server: Server, model: Any, address: str, port: int) -> None:
        if is_peft(model):
            raise ValueError(
                "weight_sync 'nccl' sends the parameters as they are, and an adapter's are not the model's. Cure: weight_sync 'disk'."
            )
        if find_spec("vllm") is None:
            raise SamplerError("weight_sync 'nccl' needs the package vllm here as well. Cure: pip install vllm, or weight_sync 'disk'.")
        self.server, self.address, self.port = server, address, port
        self._engine: Any = None

    def send(self, model: Any, step: int) -> None:
        if self._engine is None:
            self._engine = self._connect(inner_model(model))
        self._engine.send_weights()
        first = _rank() == 0
        _together(lambda: self.server.post("/reset_prefix_cache?reset_running_requests=true", {}, repeatable=False) if first else None)

    def close(self) -> None:
        self._engine = None

    def _connect(self, model: Any) -> Any:
        try:
            from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, ModuleSource, WeightTransferTrainerFactory
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        except ImportError as error:
            raise SamplerError(
                f"weight_sync 'nccl': this vllm has no weight transfer engine for trainers ({error}). "
                "Cure: a newer vllm, or weight_sync 'disk'."
            ) from error
        workers = int(self.server.get("/get_world_size")["world_size"])
        info = NCCLTrainerInitInfo(master_address=self.address, master_port=self.port, world_size=workers + 1, rank=_rank(), packed=True)
        client = HTTPVLLMWeightSyncClient(self.server.url)
        return WeightTransferTrainerFactory.trainer_init(init_info=info, client=client, source=ModuleSource(model))


@torch.no_grad()
def merged_state_dict(model: Any) -> dict[str, Tensor]:
    """The weights under the names a checkpoint of the inner model has: whole where they are sharded, with an adapter's share added.

    The model is not touched: merging in place and undoing it would leave rounding behind in every step. Empty on all processes but the
    first, if sharded.
    """
    if type(model).__name__ == "DeepSpeedEngine":
        raise ValueError(
            "model is a DeepSpeedEngine; its weights can be gathered under DDP or FSDP only. Cure: FSDP, or DeepSpeed stage 2 and below."
        )
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state: dict[str, Any] = dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)))
    else:
        state = dict(without_wrappers(model).state_dict())
    return _merge_adapter(without_wrappers(model), state) if is_peft(without_wrappers(model)) else state


def _merge_adapter(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a PEFT model without PEFT's names: W + the active adapters' deltas; trained copies (modules_to_save) win."""
    deltas: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer") and not module.merged:
            for adapter in module.active_adapters:
                if adapter in getattr(module, "lora_A", {}) or adapter in getattr(module, "lora_embedding_A", {}):
                    delta = module.get_delta_weight(adapter)
                    deltas[name] = deltas[name] + delta if name in deltas else delta
                elif hasattr(module, "lora_A"):
                    continue
                else:
                    raise ValueError(f"{name} has an adapter of type {type(module).__name__}, which is no LoRA; expected LoRA to merge it.")
    prefix = "base_model.model."
    merged: dict[str, Tensor] = {}
    for key, value in state.items():
        short = key.removeprefix(prefix)
        if "original_module." in short or any(f".{part}" in f".{short}" for part in ("lora_", "modules_to_save.")):
            continue
        owner, _, leaf = key.rpartition(".base_layer.")
        if owner and leaf == "weight" and owner in deltas:
            value = (value.float() + deltas[owner].to(value.device).float()).to(value.dtype)
        merged[short.replace(".base_layer.", ".")] = value
    for key, value in state.items():  # after the rest: the trained copy wins
        short = key.removeprefix(prefix)
        for adapter in model.active_adapters:
            if f".modules_to_save.{adapter}." in f".{short}":
                merged[short.replace(f"modules_to_save.{adapter}.", "")] = value
    return merged


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _rank() -> int:
    return torch.distributed.get_rank() if _distributed() else 0


def _together(act: Callable[[], object]) -> None:
    """Act, and wait until all processes have; if the first one fails, all raise, rather than that the others wait for it for ever."""
    failure: SamplerError | None = None
    try:
        act()
    except SamplerError as error:
        failure = error
    if _distributed():
        words = [None if failure is None else str(failure)]
        torch.distributed.broadcast_object_list(words, src=0)
        if failure is None and words[0] is not None:
            failure = SamplerError(f"process 0: {words[0]}")
    if failure is not None:
        raise failure
