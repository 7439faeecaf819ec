"""A stand-in for ``vllm serve`` on the loopback interface, with the endpoints that the client uses, a small model, and faults on demand."""

from __future__ import annotations

import copy
import json
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest import mock

import torch

import grpo_fast as gf
from grpo_fast.generation import Completion, SamplingParams
from grpo_fast.generation.transformers_sampler import TransformersSampler

IDLE_SECONDS = 0.2
TRANSFER = ("/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update")
SHUTDOWN = "/shutdown_weight_transfer_engine"
# Those of vLLM 0.32's GenerateRequest and SamplingParams that a client may need
GENERATE_FIELDS = {
    "request_id",
    "model",
    "token_ids",
    "sampling_params",
    "return_token_ids",
    "output_mode",
    "stream",
    "priority",
    "cache_salt",
}
SAMPLING_FIELDS = {"n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p", "seed"}
SAMPLING_FIELDS |= {"stop_token_ids", "ignore_eos", "max_tokens", "min_tokens", "logprobs", "detokenize", "skip_special_tokens"}
SAMPLING_FIELDS |= {"logit_bias", "allowed_token_ids", "bad_words", "structured_outputs", "thinking_token_budget"}


class StandIn:
    """The server's state, for a test to look at and to break.

    ``faults`` are taken one by one, each by one request for completions: "500", "400", "hang", "cut" (half a JSON text), "broken" (the
    connection closes before the announced length), "closed" (it closes without an answer, as an idle
    one does), "other prompt", "short" (a finish_reason that does not fit), "no logprobs".
    """

    def __init__(
        self,
        model: Any,
        *,
        logprobs_mode: str = "processed_logprobs",
        dev_mode: bool = True,
        versions: bool = True,
        scale_out: bool = False,
        return_sampling_mask: bool = False,
        max_logprobs: int = 20,
    ) -> None:
        self.model, self.logprobs_mode, self.dev_mode = model, logprobs_mode, dev_mode
        self.versions = versions  # whether it names its weights, as vLLM 0.32 does and older ones do not
        self.scale_out = scale_out  # whether it serves /inference/v1/generate (--enable-scale-out)
        self.return_sampling_mask, self.max_logprobs = return_sampling_mask, max_logprobs
        self.generated: list[dict[str, Any]] = []  # requests to /inference/v1/generate
        self.base, self.weight_version = copy.deepcopy(model), "default"
        self.version_calls: list[str] = []  # /weight_info, /update_weight_version and questions about the model
        self.on_cpu, self.version = False, "0.32.0"  # what it says of itself
        self.forgets = True  # whether it can empty its prefix cache
        self.breaks = 0  # so many updates of the weights break the connection, because the server is restarted
        self.restart_at = -1  # the request for a completion at which it is restarted
        self.faults: list[str] = []
        self.change: Callable[[dict[str, Any]], Any] | None = None  # what it makes of each answer
        self.requests: list[dict[str, Any]] = []  # of completions
        self.calls: list[str] = []  # paths of everything else
        self.wire: dict[str, torch.Tensor] = {}  # in place of NCCL: what the trainer's side has broadcast
        self.phase = ""  # of the weight transfer
        self.init_info: dict[str, Any] = {}
        self.hangs_at_shutdown = False  # of the transfer
        self.left = False  # whether the trainer's side has left the transfer's group
        self.release = threading.Event()
        self.lock = threading.Lock()

    def draw(self, prompt: list[int], sampling: dict[str, Any]) -> tuple[Completion, torch.Tensor]:
        """A completion with the sets that it was drawn from, and what the server reports as log-probabilities, [T, V]."""
        if sampling["logprobs"] > self.max_logprobs:
            raise ValueError(f"Requested sample logprobs of {sampling['logprobs']}, which is greater than max allowed: {self.max_logprobs}")
        if self.return_sampling_mask and sampling["temperature"] <= 0:
            raise ValueError("sampling distribution replay requires temperature > 0")
        if self.return_sampling_mask and sampling["top_k"] <= 0:
            raise ValueError("sampling distribution replay requires top_k > 0 to bound sampling mask size")
        if not sampling.get("ignore_eos"):
            raise ValueError("the client must name its own end tokens")
        greedy = sampling["temperature"] == 0
        params = SamplingParams(
            sampling["max_tokens"],
            [sampling["temperature"]],
            1.0 if greedy else sampling["top_p"],
            0 if greedy else sampling["top_k"],
            0.0 if greedy else sampling["min_p"],
            sampling.get("seed"),
            eos_token_id=sampling["stop_token_ids"],
            pad_token_id=0,
            return_support=True,
            repetition_penalty=sampling["repetition_penalty"],
        )
        with self.lock:
            done = TransformersSampler(self.model).generate([prompt], params)[0]
            with torch.no_grad():
                logits = self.model(input_ids=torch.tensor([prompt + done.token_ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        values = logits.float()
        if self.logprobs_mode == "processed_logprobs" and not greedy:
            values = values / sampling["temperature"]
            if done.support is not None:
                values = values.masked_fill(~done.support.dense(values.shape[-1]), -torch.inf)
        if self.logprobs_mode != "raw_logits":
            values = values.log_softmax(-1)
        return done, values.clamp(min=-9999.0)  # as in the server's JSON

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer of /v1/completions."""
        prompt = body["prompt"]
        if not body.get("return_token_ids"):
            raise ValueError("the client must ask for ids")
        done, values = self.draw(prompt, body)
        ids = torch.tensor(done.token_ids)
        sampled = values.gather(-1, ids[:, None]).squeeze(-1).tolist()
        if done.logprobs is not None and self.logprobs_mode == "processed_logprobs":
            sampled = done.logprobs
        top = values.topk(min(max(body["logprobs"], 1), values.shape[-1]), -1)
        tops = [
            {f"token_id:{token}": value} | {f"token_id:{i}": v for i, v in zip(row_ids, row, strict=True)}
            for token, value, row_ids, row in zip(done.token_ids, sampled, top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        return {
            "object": "text_completion",
            "choices": [
                {
                    "index": 0,
                    "text": "",
                    "prompt_token_ids": prompt,
                    "token_ids": done.token_ids,
                    "finish_reason": "stop" if done.finished else "length",
                    "logprobs": {
                        "tokens": [f"token_id:{token}" for token in done.token_ids],
                        "token_logprobs": sampled,
                        "top_logprobs": tops,
                    },
                }
            ],
        }

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer of /inference/v1/generate: ``GenerateTokensResponse`` of vLLM 0.32."""
        if unknown := set(body) - GENERATE_FIELDS:
            raise ValueError(f"GenerateRequest has no {unknown}")
        if unknown := set(body["sampling_params"]) - SAMPLING_FIELDS:
            raise ValueError(f"SamplingParams has no {unknown}")
        prompt, sampling = body["token_ids"], body["sampling_params"]
        done, values = self.draw(prompt, sampling)
        vocabulary = values.shape[-1]
        masks = None
        if self.return_sampling_mask:
            sets = done.support if done.support is not None else gf.Support.unrestricted(len(done.token_ids))
            masks = [kept.nonzero()[:, 0].tolist() for kept in sets.dense(vocabulary)]  # in the order of the ids
        content = []
        for token, row, value in zip(done.token_ids, values.tolist(), done.logprobs or [0.0] * len(done.token_ids), strict=True):
            entry = {"token_id": token, "logprob": value, "rank": sum(other > row[token] for other in row) + 1}
            content.append(entry | {"top_logprobs": [entry]})
        choice = {
            "index": 0,
            "finish_reason": "stop" if done.finished else "length",
            "stop_reason": done.token_ids[-1] if done.finished else None,
            "token_ids": done.token_ids,
            "routed_experts": None,
            "sampling_mask": masks,
            "weight_versions": [{"version": self.weight_version, "start": 0, "end": len(done.token_ids)}],
            "logprobs": {"content": content} if sampling.get("logprobs") is not None else None,
        }
        echoed = prompt if body.get("return_token_ids") else None
        return {"request_id": "1", "model": "stand-in", "choices": [choice], "prompt_token_ids": echoed, "output_mode": "tokens"}

    def restart(self) -> None:
        """It has the weights that it was started with, and their name."""
        with self.lock:
            self.model, self.weight_version, self.phase = copy.deepcopy(self.base), "default", ""

    def inspection(self) -> dict[str, Any]:
        """What ``get_model_inspection`` of vLLM 0.32 prints, as far as the client reads it."""
        config = self.model.config
        vocabulary = f"num_embeddings={config.vocab_size + 3}, embedding_dim={config.hidden_size}, org_vocab_size={config.vocab_size}"
        width, heads = config.hidden_size, config.num_attention_heads + 2 * config.num_key_value_heads
        sizes = {
            "qkv_proj": ("QKVParallelLinear", width, heads * (width // config.num_attention_heads)),
            "o_proj": ("RowParallelLinear", width, width),
            "gate_up_proj": ("MergedColumnParallelLinear", width, 2 * config.intermediate_size),
            "down_proj": ("RowParallelLinear", config.intermediate_size, width),
        }
        linears = "".join(
            f"   ({name}): {kind}(in_features={i}, output_features={o}, bias=False, tp_size=1, gather_output=False)\n"
            for name, (kind, i, o) in sizes.items()
        )
        layers = f"(layers): ModuleList()(\n (0-{config.num_hidden_layers - 1}): {config.num_hidden_layers} x Qwen2DecoderLayer()(\n"
        embedding = f"(embed_tokens): VocabParallelEmbedding({vocabulary}, tp_size=1)"
        attention = f"   (attn): Attention(head_size=8, backend={'CPUAttention' if self.on_cpu else 'FlashAttention'}BackendImpl)\n"
        return {"results": [f"Qwen2ForCausalLM()(\n {embedding}\n {layers}{linears}{attention})))"]}

    def reload(self, body: dict[str, Any]) -> dict[str, Any]:
        from transformers import AutoModelForCausalLM

        if body["method"] != "reload_weights":
            raise ValueError(f"no method {body['method']}")
        with self.lock:
            self.model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"]).eval()
        return {"results": [None]}

    def transfer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The four phases of vLLM's weight transfer, which must come in their order (vLLM documentation, "Weight Transfer")."""
        before = {
            "init_weight_transfer_engine": "",
            "start_weight_update": "ready",
            "update_weights": "open",
            "finish_weight_update": "open",
        }
        if self.phase != before[path]:
            raise ValueError(f"{path} while {self.phase or 'no engine is there'}")
        if path == "init_weight_transfer_engine":
            self.init_info, self.phase = body["init_info"], "ready"
        elif path == "start_weight_update":
            self.phase = "open"
        elif path == "update_weights":
            info = body["update_info"]
            assert info["names"] == list(self.wire) and info["shapes"] == [list(value.shape) for value in self.wire.values()]
            with self.lock, torch.no_grad():
                parameters = dict(self.model.named_parameters())
                for name, value in self.wire.items():
                    parameters[name].copy_(value)
        else:
            self.phase = "ready"
        return {"message": "done"}


@contextmanager
def vllm_installed(stand_in: StandIn) -> Iterator[None]:
    """A package ``vllm`` with the trainer's side of its weight transfer as documented; tensors go to the stand-in without NCCL."""

    class HTTPVLLMWeightSyncClient:
        def __init__(self, base_url: str, timeout: float = 300) -> None:
            self.base_url, self.timeout = base_url, timeout

        def post(self, path: str, **body: Any) -> None:
            request = urllib.request.Request(f"{self.base_url}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
            urllib.request.urlopen(request, timeout=self.timeout).close()

    class ModuleSource:
        def __init__(self, module: torch.nn.Module) -> None:
            self.module = module

    @dataclass
    class NCCLTrainerInitInfo:
        master_address: str
        master_port: int
        world_size: int
        rank: int
        packed: bool = True

    class Engine:
        def __init__(self, client: HTTPVLLMWeightSyncClient, source: ModuleSource) -> None:
            self.client, self.source = client, source

        def shutdown(self) -> None:
            stand_in.left = True

        def send_weights(self) -> None:
            stand_in.wire = {name: value.detach().clone() for name, value in self.source.module.named_parameters()}
            shapes = [list(value.shape) for value in stand_in.wire.values()]
            self.client.post("start_weight_update")
            self.client.post("update_weights", update_info={"names": list(stand_in.wire), "shapes": shapes})
            self.client.post("finish_weight_update")

    class WeightTransferTrainerFactory:
        @staticmethod
        def trainer_init(init_info: NCCLTrainerInitInfo, client: HTTPVLLMWeightSyncClient, source: ModuleSource) -> Engine:
            client.post("init_weight_transfer_engine", init_info=asdict(init_info))
            return Engine(client, source)

    def package(name: str, *members: type) -> ModuleType:
        module = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None, is_package=True), []
        vars(module).update({member.__name__: member for member in members})
        return module

    packages = [
        package("vllm"),
        package("vllm.distributed"),
        package("vllm.distributed.weight_transfer", HTTPVLLMWeightSyncClient, ModuleSource, WeightTransferTrainerFactory),
        package("vllm.distributed.weight_transfer.nccl_engine", NCCLTrainerInitInfo),
    ]
    with mock.patch.dict(sys.modules, {each.__name__: each for each in packages}):
        yield


@contextmanager
def serving(stand_in: StandIn) -> Iterator[str]:
    """Serve on a free port of 127.0.0.1 while the context is open. Yields the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = IDLE_SECONDS  # of an idle connection, after which it is closed: uvicorn does so after 5 s

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, content: Any, *, announce: int | None = None) -> None:
            text = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text) if announce is None else announce))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self) -> None:
            stand_in.calls.append(self.path)
            if self.path == "/weight_info" and stand_in.versions and stand_in.dev_mode:
                stand_in.version_calls.append(stand_in.calls.pop())
                self.answer(200, {"weight_version": stand_in.weight_version})
            elif self.path == "/weight_info":
                stand_in.version_calls.append(stand_in.calls.pop())
                self.answer(404, {"detail": "Not Found"})
            elif self.path == "/version":
                stand_in.version_calls.append(stand_in.calls.pop())
                self.answer(200, {"version": stand_in.version})
            elif self.path == "/v1/models":
                self.answer(200, {"data": [{"id": "stand-in"}]})
            elif self.path == "/get_world_size" and stand_in.dev_mode:
                self.answer(200, {"world_size": 2})
            else:
                self.answer(404, {"detail": "Not Found"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
            if self.path == "/v1/completions":
                self.completions(body)
                return
            if self.path == "/inference/v1/generate":
                self.generate(body)
                return
            asked = self.path == "/update_weight_version" or body.get("method") == "get_model_inspection"
            (stand_in.version_calls if asked else stand_in.calls).append(self.path)
            if asked and stand_in.dev_mode and stand_in.versions:
                if body.get("method"):
                    self.answer(200, stand_in.inspection())
                else:
                    stand_in.weight_version = body["new_version"]
                    self.answer(200, {"success": True, "new_version": body["new_version"]})
            elif not stand_in.dev_mode:
                self.answer(404, {"detail": "Not Found"})
            elif self.path == "/collective_rpc" and stand_in.breaks > 0:
                stand_in.breaks -= 1
                stand_in.restart()
                self.close_connection = True
            elif self.path == "/collective_rpc":
                try:
                    self.answer(200, stand_in.reload(body))
                except Exception as error:
                    self.answer(500, {"error": str(error)})
            elif self.path.startswith("/reset_prefix_cache"):
                self.answer(200, {"success": stand_in.forgets})
            elif self.path in TRANSFER:
                try:
                    self.answer(200, stand_in.transfer(self.path.lstrip("/"), body))
                except Exception as error:
                    self.answer(500, {"error": str(error)})
            elif self.path == SHUTDOWN:
                if stand_in.hangs_at_shutdown:
                    stand_in.release.wait(20)
                stand_in.phase = ""
                self.answer(200, {"message": "Weight transfer shut down"})
            else:
                self.answer(404, {"detail": "Not Found"})

        def generate(self, body: dict[str, Any]) -> None:
            stand_in.generated.append(body)
            if not stand_in.scale_out:
                self.answer(403, {"error": {"message": "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out"}})
                return
            try:
                content = stand_in.generate(body)
            except ValueError as error:
                self.answer(400, {"error": {"message": str(error), "type": "BadRequestError", "code": 400}})
                return
            probe = body["sampling_params"]["max_tokens"] == 1
            self.answer(200, content if stand_in.change is None or probe else stand_in.change(content))

        def completions(self, body: dict[str, Any]) -> None:
            stand_in.requests.append(body)
            if len(stand_in.requests) == stand_in.restart_at:
                stand_in.restart()
            with stand_in.lock:
                fault = stand_in.faults.pop(0) if stand_in.faults else None
            if fault in ("500", "400"):
                self.answer(int(fault), {"error": {"message": "engine says no"}})
                return
            if fault == "closed":
                self.close_connection = True
                return
            if fault == "hang":
                stand_in.release.wait(20)
            try:
                content = stand_in.complete(body)
            except ValueError as error:
                self.answer(400, {"error": {"message": str(error), "type": "BadRequestError", "code": 400}})
                return
            choice = content["choices"][0]
            if fault == "other prompt":
                choice["prompt_token_ids"] = [*choice["prompt_token_ids"], 1]
            elif fault == "short":
                choice["finish_reason"] = "abort"
            elif fault == "no logprobs":
                choice["logprobs"] = None
            if stand_in.change is not None:
                content = stand_in.change(content)
            text = json.dumps(content).encode()
            if fault == "cut":
                self.answer(200, text[: len(text) // 2])
            elif fault == "broken":
                self.answer(200, text[: len(text) // 2], announce=len(text))
                self.close_connection = True
            else:
                self.answer(200, text)

    class QuietServer(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_: Any) -> None:
            """Do not print the errors of clients that have closed their connection."""

    with QuietServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            stand_in.release.set()
            server.shutdown()
            thread.join()
