"""Draws completions with the trainer's sampler and scores them with its rewards, for rollouts and for evaluations."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import AutocastKwargs, gather_object
from torch import Tensor, nn

from grpo_fast.data.chats import sends_as_chat
from grpo_fast.data.prompts import encode_prompt
from grpo_fast.data.row_checks import Prompt
from grpo_fast.generation import Completion, SamplerError, SamplingParams, WeightsLostError
from grpo_fast.models.exact_head import float32_head
from grpo_fast.models.unwrap import end_tokens_of, is_sharded
from grpo_fast.trainer.prompt_source import Row
from grpo_fast.trainer.reward_log import RewardLog
from grpo_fast.trainer.rollout import Rollout
from grpo_fast.trainer.special_tokens import decode_completions
from grpo_fast.trainer.surrogate_columns import columns_of
from grpo_fast.utils.seeds import derived_seed

if TYPE_CHECKING:
    from grpo_fast.trainer.grpo_trainer import GRPOTrainer

__all__ = ["CompletionRunner", "GeneratedCompletion"]

logger = logging.getLogger("grpo_fast")
ATTEMPTS = 3  # to draw completions from a sampler that loses its weights
COMPARED_TOKENS = 16  # of a completion that is drawn only to compare the sampler with the loss


class GeneratedCompletion(NamedTuple):
    """A sampler's completion with its prompt and its text."""

    prompt_ids: list[int]
    completion: Completion
    text: str
    extra: dict[str, Any]  # values for the completions table, which rewards set with ``log_extra``
    columns: Mapping[str, float] = {}


class CompletionRunner:
    """Draws and scores completions with a trainer's sampler, tokenizer, rewards and reference policy, and adds metrics to the trainer's."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.trainer = trainer
        self._weights_step = -1
        self._described: set[str] = set()  # datasets of which the log says how their prompts are sent

    def sends_as_chat(self, dataset: object, name: str) -> bool:
        """Whether the prompts of this dataset that are texts are sent as chats; the log says it once for each name."""
        trainer, tell = self.trainer, name not in self._described
        self._described.add(name)
        return sends_as_chat(trainer.args.chat, dataset, trainer.processing_class, name, tell=tell and trainer.accelerator.is_main_process)

    def check_first_prompts(self, datasets: Mapping[str, object]) -> None:
        """Encode the first prompt of each dataset, so that a tokenizer without chat template is found before training, and read the columns
        of its row that a custom surrogate takes.

        Raises:
            ValueError: a prompt cannot be encoded, or a column is missing.
        """
        for name, dataset in datasets.items():
            if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
                self._encode_prompt(dataset[0]["prompt"], self.sends_as_chat(dataset, name))
                columns_of(self.trainer.loss_config, dataset[0])

    def forget_weights(self) -> None:
        """Send the weights to the sampler before the next completions, even if it has them already."""
        self._weights_step = -1

    def generate_completions(
        self,
        rows: Sequence[Row],
        temperatures: Sequence[float],
        *seed_parts: object,
        as_chat: bool = False,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        return_support: bool = False,
    ) -> list[GeneratedCompletion]:
        """Draw one completion per row, each at its own temperature.

        Args:
            rows: rows of the dataset; a group's completions share one row object.
            temperatures: one per row.
            seed_parts: numbers that identify these completions within the run; the random numbers depend on them, on the run's seed and
                on the process.
            as_chat: send prompts that are texts as chats, see `sends_as_chat`.
            top_p, top_k, min_p: truncation of the sampler's distribution.
            return_support: ask for the sets of tokens that truncation keeps.

        Raises:
            ValueError: the sampler returned another number of completions.
        """
        trainer, tokenizer = self.trainer, self.trainer.processing_class
        prompts = self._encode(rows, as_chat)
        # A sharded model needs every process in each forward pass: a process without rows draws a completion that is discarded.
        unused = int(not rows and is_sharded(trainer.model_wrapped))
        if unused:
            prompts, temperatures = [[tokenizer.eos_token_id]], [1.0]
        params = SamplingParams(
            trainer.args.max_completion_length,
            list(temperatures),
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            return_support=return_support,
            repetition_penalty=trainer.args.repetition_penalty,
            generation_kwargs=trainer.args.generation_arguments,
            **self._tokens_and_seed(*seed_parts),
        )
        drawn = self._draw(prompts, params)
        drawn = drawn[: len(drawn) - unused]
        if len(drawn) != len(rows):
            raise ValueError(f"the sampler returned {len(drawn)} completions for {len(rows)} prompts; expected one for each, in order.")
        for index, each in enumerate(drawn):
            if not isinstance(each, Completion) or not each.token_ids:
                what = "without tokens" if isinstance(each, Completion) else f"that is a {type(each).__name__}"
                prompt = repr(rows[index]["prompt"])[:200]
                raise SamplerError(
                    f"the sampler returned a completion {what} for prompt {index}, {prompt}; expected a Completion with at least one "
                    "token, and be it the end token."
                )
        texts = decode_completions(
            tokenizer,
            [each.token_ids for each in drawn],
            end_tokens=end_tokens_of(trainer.model, tokenizer),
            skip_special_tokens=trainer.args.skip_special_tokens,
        )
        columns = [columns_of(trainer.loss_config, row) for row in rows]
        return [GeneratedCompletion(*parts[:3], {}, parts[3]) for parts in zip(prompts, drawn, texts, columns, strict=False)]

    def score(self, rows: Sequence[Row], completions: Sequence[GeneratedCompletion], temperatures: Sequence[float]) -> Tensor:
        """Call the rewards.

        Args:
            rows: B rows of the dataset, whose columns the rewards read.
            completions: the B completions for them.
            temperatures: at which they were drawn; the reference's log-probabilities are taken at the same.

        Returns:
            float32 [B, R], NaN where a reward does not apply.
        """
        trainer = self.trainer
        extras: dict[str, Any] = {}
        if trainer.reference.for_rewards:  # before the check for rows: a sharded reference needs every process
            with trainer.metrics.timed("step_time/logprobs"):
                extras["ref_logprobs"] = self._reference_logprobs(completions, temperatures)
        if not rows:
            return torch.empty(0, len(trainer.rewards.names))
        columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "completion", "completion_ids")}
        outputs = [
            each.text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": each.text}]
            for row, each in zip(rows, completions, strict=True)
        ]
        log = RewardLog(trainer.metrics, len(completions))
        extras |= {
            "trainer_state": trainer.state,
            "log_metric": log.log_metric,
            "log_extra": log.log_extra,
            "logprobs": [each.completion.logprobs for each in completions],
        }
        with trainer.metrics.timed("step_time/reward"):
            prompts, token_ids = [row["prompt"] for row in rows], [each.completion.token_ids for each in completions]
            table = trainer.rewards(prompts, outputs, token_ids, extras=extras, **columns)
        for name, value in table.metrics.items():
            if not name.endswith(("/mean", "/std")):  # those are computed over all processes, by measure_rewards
                trainer.metrics.add_mean(name, value)
        for each, values in zip(completions, log.rows(), strict=True):
            each.extra.update(values)
        return table.values

    def draw_unchanged(self, prompts: list[list[int]], temperatures: Sequence[float], *seed_parts: object) -> list[Completion]:
        """Draw short completions from softmax(z/T) itself, without penalties and truncation, for a comparison with the loss.

        Args:
            prompts: token ids.
            temperatures: one per prompt.
            seed_parts: see `generate_completions`.
        """
        longest = min(self.trainer.args.max_completion_length, COMPARED_TOKENS)
        return self._draw(prompts, SamplingParams(longest, list(temperatures), **self._tokens_and_seed(*seed_parts)))

    def _tokens_and_seed(self, *seed_parts: object) -> dict[str, Any]:
        trainer, tokenizer = self.trainer, self.trainer.processing_class
        return {
            "seed": derived_seed(trainer.args.seed, *seed_parts, trainer.accelerator.process_index),
            "eos_token_id": end_tokens_of(trainer.model, tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
        }

    def _draw(self, prompts: list[list[int]], params: SamplingParams) -> list[Completion]:
        """Draw completions under the current weights: if the sampler has lost them in any process, all send them again and draw again."""
        trainer = self.trainer
        model = trainer.model_wrapped
        for _ in range(ATTEMPTS):
            drawn, lost = [], None
            try:
                self._send_weights()
                with trainer.metrics.timed("step_time/generate"), self._as_the_loss(model), trainer.model_forward.unsharded(model):
                    drawn = trainer.sampler.generate(prompts, params) if prompts else []
            except WeightsLostError as error:  # of `update_weights` in all processes, of `generate` in some
                lost = error
            losses = [message for message in gather_object([None if lost is None else str(lost)]) if message]
            if not losses:
                return drawn
            self.forget_weights()
            if trainer.accelerator.is_main_process:
                logger.warning("%s The weights are sent again, and the completions drawn again.", losses[0])
        raise lost or SamplerError(losses[0])

    @contextmanager
    def _as_the_loss(self, model: nn.Module) -> Iterator[None]:
        """The autocast of the loss, which accelerate adds to the wrapped model only, and the precision of its head."""
        args = self.trainer.args
        # autocast keeps the weights that it has cast, which saves time; of a sharded model it would keep all that are gathered on the way.
        autocast = self.trainer.accelerator.autocast(AutocastKwargs(cache_enabled=False) if is_sharded(model) else None)
        exact = args.fused_head and args.logits_dtype == "float32"
        with autocast, float32_head(model) if exact else nullcontext():
            yield

    def _send_weights(self) -> None:
        trainer = self.trainer
        if self._weights_step != trainer.state.global_step:
            with trainer.metrics.timed("step_time/weight_sync"):
                trainer.sampler.update_weights(trainer.model_wrapped, trainer.state.global_step)
            self._weights_step = trainer.state.global_step

    def _encode(self, rows: Sequence[Row], as_chat: bool) -> list[list[int]]:
        """Return the token ids of the rows' prompts; a row that occurs several times is encoded once."""
        distinct = {id(row): row["prompt"] for row in rows}
        encoded = {key: self._encode_prompt(prompt, as_chat) for key, prompt in distinct.items()}
        return [encoded[id(row)] for row in rows]

    def _encode_prompt(self, prompt: Prompt, as_chat: bool) -> list[int]:
        options = self.trainer.args.chat_template_kwargs
        try:
            ids = encode_prompt(prompt, self.trainer.processing_class, options, as_chat=as_chat)
        except ValueError:
            raise
        except Exception as error:  # a chat template raises what it likes
            what = f"the chat template or the tokenizer does not take the prompt {prompt!r:.200}"
            raise ValueError(f"{what}: {type(error).__name__}: {error}. Fix: change or leave out the row.") from error
        if not ids:
            raise ValueError(f"the prompt {prompt!r:.200} has no tokens; expected a question. Fix: leave the row out.")
        return ids

    @torch.no_grad()
    def _reference_logprobs(self, completions: Sequence[GeneratedCompletion], temperatures: Sequence[float]) -> list[list[float]]:
        """Return the log-probabilities of each completion's tokens under the reference policy, for rewards that read them."""
        trainer, zeros = self.trainer, torch.zeros(len(completions))
        token_ids = [each.completion.token_ids for each in completions]
        rollout = Rollout([each.prompt_ids for each in completions], token_ids, zeros + torch.tensor(temperatures), zeros, zeros == 0)
        with trainer.reference.of(trainer.model_wrapped, trainer.accelerator.unwrap_model(trainer.model_wrapped)) as reference:
            found = trainer.model_forward.logprobs(reference, rollout, batch_size=trainer.args.per_device_train_batch_size).logprobs
        return [part.tolist() for part in found.cpu().split(rollout.lengths)]
