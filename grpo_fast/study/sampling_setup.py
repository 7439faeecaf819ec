"""Settings of ``grpo-fast study sampling``: parsed, checked, and loaded; the model is loaded last, by `load_model`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_fast.data.loading import load_rewards, load_tokenizer, make_task, prompt_rows
from grpo_fast.data.tasks import Task
from grpo_fast.data.tasks.sorting import make_tokenizer, question, split_questions
from grpo_fast.generation import check_options
from grpo_fast.ops.environment import describe
from grpo_fast.rewards import CoherenceReward, FormatReward, Reward, RewardRunner, accuracy_reward
from grpo_fast.study.correctness import correctness_index
from grpo_fast.study.options import check_count, sampling_temperatures
from grpo_fast.study.result_files import JSONObject, load_study
from grpo_fast.trainer.config import GRPOConfig
from grpo_fast.trainer.run_settings import TrainOptions, parse, parse_overrides
from grpo_fast.utils.errors import SettingsError
from grpo_fast.utils.files import check_output
from grpo_fast.utils.redaction import is_secret_name, redact
from grpo_fast.utils.warn import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["CONFIG_SETTINGS", "SHARED", "Row", "SamplingOptions", "SamplingStudy", "load_model", "prepare_sampling", "study_threads"]

Row = Mapping[str, Any]  # of a dataset

DEMO = "demo"  # name of the demonstration's model, after its warm start, and of its dataset
CONFIG_SETTINGS = (  # of GRPOConfig that the study reads
    *("max_completion_length", "top_p", "top_k", "min_p", "seed", "data_seed", "per_device_eval_batch_size"),
    *("repetition_penalty", "generation_kwargs"),
    *("sampler", "sampler_options", "sampler_tolerance", "chat", "chat_template_kwargs"),
    *("reward_weights", "multi_objective_aggregation", "reward_timeout", "reward_on_error", "reward_isolation"),
    *("model_init_kwargs", "trust_remote_code", "use_cpu", "bf16", "fp16", "fused_head", "packing"),
)
TRL_SAMPLER_SETTINGS = (  # of GRPOConfig, which derives ``sampler`` and ``sampler_options`` from them
    *("use_vllm", "vllm_mode", "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "use_transformers_continuous_batching"),
)
NOT_READ = tuple(each.name for each in fields(TrainOptions) if each.name.startswith(("eval_", "lora_", "use_peft")))
SHARED = tuple(each.name for each in fields(TrainOptions) if each.name not in NOT_READ)
ALTERNATIVES = {"temperature": "temperatures", "eval_temperature": "temperatures", "num_generations": "samples", "eval_rounds": "rounds"}
PART_KEYS = ("temperature", "per_prompt", "rewards", "examples", "seconds")  # of every finished temperature
BATCH_SIZE = {"per_device_eval_batch_size": 64}  # nothing is trained, so that more fits than transformers' default of 8
DEMO_SETTINGS = {"max_completion_length": 32, "ngram": 6, "per_device_eval_batch_size": 512}  # as in grpo-fast demo
QUICK = {"prompts": 8, "samples": 2, "rounds": 1, "max_completion_length": 32, "warm_start_steps": 20}


@dataclass
class SamplingOptions(TrainOptions):
    """What is measured. Model, dataset and rewards are named as for ``grpo-fast train``; ``demo`` is the demonstration's model and task,
    before GRPO, with completions of at most 32 tokens.

    Args:
        temperatures: to sample at; 0 is greedy decoding.
        samples: completions per prompt and round: the group that GRPO would compare, and the k of pass@k and cons@k; by default
            num_generations of the settings file, if there is one.
        rounds: number of groups per prompt.
        prompts: number of rows of the dataset that are used, from the first on.
        correct: the reward that says whether an answer is correct (full marks: 1); by default accuracy, math, or the task's own.
        ngram: length, in tokens, of the n-grams whose repetition is counted.
        keep: share of the highest pass@1 below which a temperature counts as performance collapse.
        warm_start_steps: of the model 'demo': steps of imitation.
        output: the result as JSON; measurements, table, figure and page take the same name with .raw.json, .csv, .png and .html.
        quick: eight prompts and a few short completions, to test whether it runs; its figures mean nothing.
    """

    temperatures: list[str] = field(default_factory=lambda: ["0", "0.2", "0.6", "1.0", "1.4"])
    samples: int = 8
    rounds: int = 4
    prompts: int = 100
    correct: str | None = None
    ngram: int = 4
    keep: float = 0.5
    warm_start_steps: int = 160
    output: str = "runs/study/sampling.json"
    quick: bool = False


@dataclass
class SamplingStudy:
    """A sampling study whose settings are valid, with everything loaded but the model, and what of it is finished."""

    options: SamplingOptions
    config: GRPOConfig
    temperatures: list[float]  # from cold to hot
    tokenizer: PreTrainedTokenizerBase
    rows: Sequence[Row]  # N, each with a prompt
    runner: RewardRunner
    correct: int  # index of the reward that says whether an answer is correct
    coherence: CoherenceReward | None  # None if no reward says that completions have a format
    path: Path
    measurements: JSONObject  # see `load_study`; its list "drawn" grows
    result: JSONObject | None = None  # if everything is finished and only the result is there

    def missing(self) -> list[float]:
        """Return the temperatures that are not finished, from cold to hot."""
        if self.result is not None:
            return []
        done = {one["temperature"] for one in self.measurements["drawn"]}
        return [temperature for temperature in self.temperatures if temperature not in done]


def prepare_sampling(args: Sequence[str]) -> SamplingStudy:
    """Parse and check the settings, load rewards, tokenizer and data, and read what is finished of this study.

    Raises:
        SettingsError, ValueError, TypeError: names the setting, what it was, what was expected and the fix.
    """
    _refuse_settings_not_read(args)
    options, config, given = parse(args, GRPOConfig, SamplingOptions)
    defaults = BATCH_SIZE | (DEMO_SETTINGS if options.model == DEMO else {}) | {"samples": config.num_generations}
    for name, value in (defaults | (QUICK if options.quick else {})).items():
        if name not in given:
            setattr(options if hasattr(options, name) else config, name, value)
    if options.quick and "output" not in given:
        options.output = options.output.replace(".json", "_quick.json")
    temperatures = sampling_temperatures(options.temperatures)
    check_count("samples", options.samples, "It is the size of a group: 8 is usual.")
    check_count("rounds", options.rounds, "More rounds give smaller errors: 4 is usual.")
    check_count("prompts", options.prompts, "Errors are taken over prompts: 100 is usual.")
    check_count("ngram", options.ngram, "It is the length of the n-grams: 4 is usual.")
    check_count("warm_start_steps", options.warm_start_steps, "The demonstration takes 160.")
    if not 0 < options.keep < 1:
        raise SettingsError(f"keep is {options.keep!r}; expected a number above 0 and below 1: a share of the highest pass@1, such as 0.5.")
    path = Path(options.output)
    check_output(path)
    task = _make_task(options, config.prompt_seed)
    rewards = load_rewards(options.rewards, task)
    runner = RewardRunner(
        rewards,
        weights=config.reward_weights,
        timeout=config.reward_timeout,
        on_error=config.reward_on_error,
        isolation=config.reward_isolation,
    )
    correct = correctness_index(options.correct, list(options.rewards or ["task"]), runner.names, rewards, task)
    check_options(config.sampler, config.sampler_options or {})
    tokenizer = make_tokenizer() if options.model == DEMO else load_tokenizer(options)
    if tokenizer.eos_token_id is None:
        raise SettingsError("the tokenizer has no eos_token_id; expected one: a completion ends with it.")
    assert options.dataset is not None
    chat = config.chat_template_kwargs
    assert not isinstance(chat, str)  # GRPOConfig parses JSON
    rows = prompt_rows(
        options.dataset,
        options.dataset_split,
        task,
        options,
        tokenizer,
        runner,
        chat=config.chat,
        chat_template_kwargs=chat,
        limit=options.prompts,
    )
    if len(rows) < options.prompts and "prompts" in given:
        warn(f"prompts is {options.prompts}, and only {len(rows)} rows can be used.")
    new = {
        "kind": "temperature_sampling",
        "quick": options.quick,
        "machine": describe(),
        "options": _recorded_options(options, config, rows),
        "correct": runner.names[correct],
        "drawn": [],
    }
    stored = load_study(path, new, "sampling", part_keys=PART_KEYS, question={"temperatures": temperatures})
    coherence = _coherence_reward(rewards)
    return SamplingStudy(
        options, config, temperatures, tokenizer, rows, runner, correct, coherence, path, stored.measurements, stored.result
    )


def study_threads(study: SamplingStudy) -> AbstractContextManager[None]:
    """Return a context with one thread for the demonstration's model, see `one_thread`, and with the default for all others."""
    if study.options.model == DEMO:
        from grpo_fast.demo.warm_start import one_thread

        return one_thread()
    return nullcontext()


def load_model(study: SamplingStudy) -> PreTrainedModel:
    """Load the model to the device of the configuration; the demonstration's model is trained by imitation first."""
    if study.options.model == DEMO:
        from grpo_fast.demo.options import DemoOptions
        from grpo_fast.demo.warm_start import warm_start

        return warm_start(DemoOptions(seed=study.config.seed, warm_start_steps=study.options.warm_start_steps)).model
    from grpo_fast.models.loading import load_policy

    model, _ = load_policy(study.options.model, study.tokenizer, **study.config.loading_options())
    return model.to(study.config.device)


def _refuse_settings_not_read(args: Sequence[str]) -> None:
    """Refuse them on the command line only: the settings file of a training may have more settings."""
    in_file = bool(args) and not args[0].startswith("-")
    read = {*CONFIG_SETTINGS, *TRL_SAMPLER_SETTINGS, *(each.name for each in fields(SamplingOptions))} - set(NOT_READ)
    for name in parse_overrides(args[1:] if in_file else args, GRPOConfig, SamplingOptions):
        if name not in read:
            fix = f"--{ALTERNATIVES[name]}." if name in ALTERNATIVES else "leave it out, or set it in the settings file."
            raise SettingsError(f"command line: --{name} is not read by the sampling study; expected what --help shows. Fix: {fix}")


def _recorded_options(options: SamplingOptions, config: GRPOConfig, rows: Sequence[Row]) -> JSONObject:
    """Return every setting that the measurements depend on, and a digest of the rows: the dataset behind a name may change."""
    own = [each.name for each in fields(options) if each.name not in (*NOT_READ, "temperatures", "output", "quick")]
    recorded: JSONObject = {name: getattr(options, name) for name in own}
    recorded |= {name: getattr(config, name) for name in CONFIG_SETTINGS if name != "data_seed"}
    for name in ("sampler_options", "model_init_kwargs"):  # left out, so that a study can be continued with another key
        if isinstance(recorded[name], dict):
            recorded[name] = {key: value for key, value in recorded[name].items() if not is_secret_name(key)}
    recorded = redact(recorded)
    digest = hashlib.sha256(json.dumps([dict(row) for row in rows], sort_keys=True, default=str).encode()).hexdigest()[:16]
    return recorded | {"prompt_seed": config.prompt_seed, "digest_of_rows": digest}


def _make_task(options: SamplingOptions, seed: int) -> Task | None:
    if options.dataset == DEMO:
        return Task([question(digits) for digits in split_questions()[1]], accuracy_reward)
    return make_task(options.dataset or "", size=min(options.dataset_size, options.prompts), seed=seed)


def _coherence_reward(rewards: Sequence[Reward]) -> CoherenceReward | None:
    """Return the coherence reward among the rewards, or one that matches the format reward."""
    for reward in rewards:
        if isinstance(reward, CoherenceReward):
            return reward
    return next((CoherenceReward(think_opened=reward.think_opened) for reward in rewards if isinstance(reward, FormatReward)), None)
