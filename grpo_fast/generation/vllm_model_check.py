"""Compares the model on a vLLM server with the one that is trained, before any weights are sent."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from packaging.version import InvalidVersion, Version
from torch import nn

from grpo_fast.generation.protocol import SamplerError
from grpo_fast.generation.vllm_http import ServerClient
from grpo_fast.models.unwrap import unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_model"]

# Layers that vLLM computes as one, and their names in transformers.
_MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
TIED_HEADS_ON_CPU = Version("0.33")  # vLLM before this does not replace them, as far as is known
_LINEAR = re.compile(r"\((\w+)\): \w*Linear\(in_features=(\d+), output_features=(\d+)[^)]*\btp_size=1\b")


def check_model(server: ServerClient, model: PreTrainedModel | nn.Module) -> None:
    """Refuse a server with a model of another vocabulary, width, depth or shape of its linear layers: vLLM's workers end when they load
    weights that do not fit, or load them in part and report success.

    The sizes are read from the text that vLLM's workers print of their model; sizes that are not found there are not compared.

    Raises:
        SamplerError: a size differs, or new weights would not reach the server's LM head.
    """
    try:
        answer = server.post("/collective_rpc", {"method": "get_model_inspection"}, retry_seconds=0.0)
    except SamplerError:
        return  # this server cannot show its model
    texts = answer.get("results") if isinstance(answer, dict) else None
    if not isinstance(texts, list) or not texts or not isinstance(texts[0], str):
        return
    inner, text = unwrap(model), texts[0]
    if "CPUAttention" in text and _trains_tied_head(inner) and _version(server) < TIED_HEADS_ON_CPU:
        raise SamplerError(
            f"{server.url}: vLLM on a CPU keeps a copy of the LM head, which new weights do not replace if the head is tied to the "
            "embedding (vLLM 0.32), and the embedding is trained. Nothing was sent. Fix: train and serve a checkpoint with "
            "tie_word_embeddings false and an lm_head.weight of its own; or an adapter without the embedding; or vLLM on a GPU."
        )
    config = getattr(inner, "config", None)
    text_config = None if config is None else config.get_text_config()
    for name, found in _printed_sizes(text, whole=len(texts) == 1).items():
        ours = getattr(text_config, name, None)
        if isinstance(ours, int) and ours != found:
            raise _differs(server, f"{name} = {found}", str(ours))
    theirs, trained = _printed_linears(text), _linears(inner)
    for name, (inputs, outputs) in theirs.items():
        parts = [trained[part] for part in _MERGED.get(name, (name,)) if part in trained]
        if len(parts) != len(_MERGED.get(name, (name,))):
            continue
        ours_in, ours_out = parts[0][0], sum(part[1] for part in parts)
        if (ours_in, ours_out) != (inputs, outputs):
            raise _differs(server, f"{name} from {inputs} to {outputs} features", f"from {ours_in} to {ours_out}")


def _differs(server: ServerClient, theirs: str, ours: str) -> SamplerError:
    return SamplerError(
        f"{server.url}: the server's model has {theirs}, the one that is trained {ours}; expected the same model. Nothing was sent. Fix: "
        "vllm serve the model that is trained."
    )


def _trains_tied_head(model: PreTrainedModel) -> bool:
    """Whether the LM head is the embedding, and changes in training."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
        return False
    return weight is getattr(embedding, "weight", None)


def _version(server: ServerClient) -> Version:
    """The server's version; 0 if it does not say."""
    try:
        answer = server.get("/version")
        return Version(str(answer.get("version"))) if isinstance(answer, dict) else Version("0")
    except (SamplerError, InvalidVersion):
        return Version("0")


def _printed_sizes(text: str, *, whole: bool) -> dict[str, int]:
    """Sizes under the names of transformers' configurations. ``whole``: the text shows all layers, not those of one of several workers."""
    sizes = {}
    embedding = re.search(r"VocabParallelEmbedding\(([^)]*)\)", text)
    for name, printed in (("vocab_size", "org_vocab_size"), ("hidden_size", "embedding_dim")):
        found = re.search(rf"\b{printed}=(\d+)", embedding[1]) if embedding else None
        if found:
            sizes[name] = int(found[1])
    layers = re.findall(r"\(\d+(?:-\d+)?\): (?:(\d+) x )?\w*DecoderLayer\(", text)
    if layers and whole:
        sizes["num_hidden_layers"] = sum(int(count or 1) for count in layers)
    return sizes


def _printed_linears(text: str) -> dict[str, tuple[int, int]]:
    """Name -> input and output features of the linear layers that are not split over workers, and have the same sizes in every layer."""
    return _same_everywhere([(name, int(inputs), int(outputs)) for name, inputs, outputs in _LINEAR.findall(text)])


def _linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The same of the model that is trained; a layer with an adapter counts as the layer itself."""
    found = []
    for name, module in model.named_modules():
        inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
        parts = name.removesuffix(".base_layer").split(".")
        if isinstance(inputs, int) and isinstance(outputs, int) and not any(part.startswith("lora_") for part in parts):
            found.append((parts[-1], inputs, outputs))
    return _same_everywhere(found)


def _same_everywhere(layers: list[tuple[str, int, int]]) -> dict[str, tuple[int, int]]:
    sizes: dict[str, set[tuple[int, int]]] = {}
    for name, inputs, outputs in layers:
        sizes.setdefault(name, set()).add((inputs, outputs))
    return {name: next(iter(found)) for name, found in sizes.items() if len(found) == 1}
