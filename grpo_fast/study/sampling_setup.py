"""What ``grpo-fast study sampling`` is asked for, checked and loaded; the model comes last."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from grpo_fast.data.loading import load_rewards, load_tokenizer, make_task, prompt_rows
from grpo_fast.data.tasks import Task
from grpo_fast.generation import check_options
from grpo_fast.ops.environment import describe
from grpo_fast.rewards import CoherenceReward, FormatReward, RewardRunner
from grpo_fast.study.options import check_count, sampling_temperatures
from grpo_fast.study.result_files import begun
from grpo_fast.trainer.run_settings import TrainOptions, parse, parse_overrides
from grpo_fast.utils.errors import SettingsError
from grpo_fast.utils.files import check_output

__all__ = ["SAMPLED_BY", "SHARED", "Prepared", "SamplingOptions", "load_model", "prepare", "threads_of"]

DEMO = "demo"  # as model and as dataset: what the demonstration begins with
RIGHT = ("accuracy_reward", "math_reward")  # rewards that say whether an answer is right
SAMPLED_BY = (  # settings of GRPOConfig that are read
    *("max_completion_length", "top_p", "top_k", "min_p", "seed", "data_seed", "per_device_eval_batch_size"),
    *("sampler", "sampler_options", "sampler_tolerance", "chat_template_kwargs"),
    *("reward_weights", "scale_rewards", "multi_objective_aggregation", "reward_timeout", "reward_on_error", "reward_isolation"),
    *("model_init_kwargs", "trust_remote_code", "use_cpu", "bf16", "fp16", "fused_head", "packing"),
)
CHOOSES_SAMPLER = (  # TRL's way to name one; the configuration makes ``sampler`` and ``sampler_options`` of it
    *("use_vllm", "vllm_mode", "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "use_transformers_continuous_batching"),
)
NOT_READ = tuple(each.name for each in fields(TrainOptions) if each.name.startswith(("eval_", "lora_", "use_peft")))
SHARED = tuple(each.name for each in fields(TrainOptions) if each.name not in NOT_READ)
INSTEAD = {"temperature": "temperatures", "eval_temperature": "temperatures", "num_generations": "samples", "eval_rounds": "rounds"}
KEPT = ("temperature", "per_prompt", "rewards", "examples", "seconds")  # of each temperature that is finished
SECRET = ("api_key", "token")  # of sampler_options and model_init_kwargs: in no result
AT_ONCE = {"per_device_eval_batch_size": 64}  # nothing is trained, so that more fit than transformers' 8
DEMO_SETTINGS = {"max_completion_length": 32, "ngram": 6, "per_device_eval_batch_size": 512}  # as grpo-fast demo; it fits any machine
QUICK = {"prompts": 8, "samples": 2, "rounds": 1, "max_completion_length": 32, "warm_start_steps": 20}


@dataclass
class SamplingOptions(TrainOptions):
    """What is measured. Model, dataset and rewards are named as for ``grpo-fast train``; ``demo`` is the demonstration's,
    before GRPO, cut at 32 tokens.

    Args:
        temperatures: to sample at; 0 is greedy decoding.
        samples: completions per prompt and round: the group that GRPO would compare, and the k of pass@k and cons@k; by default
            num_generations of the settings file, if there is one.
        rounds: how often each prompt gets its samples.
        prompts: take no more than the first so many rows.
        correct: the reward that says whether an answer is right (full marks: 1); by default accuracy, math, or the task's own.
        ngram: length, in tokens, of the n-grams whose repetition is counted.
        keep: the share of the highest pass@1 that must be left before a temperature counts as performance collapse.
        warm_start_steps: of the model 'demo': steps of imitation.
        output: the result as JSON, which also holds what is finished; table and figure take the same name with .csv and .png.
        quick: eight prompts and a few short completions, to see whether it runs; its figures mean nothing.
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
class Prepared:
    """Everything but the model, which is loaded when all else has been found right; and what of the result is there already."""

    options: SamplingOptions
    config: Any  # a GRPOConfig
    temperatures: list[float]
    tokenizer: Any
    rows: Any  # N, each with a prompt
    runner: RewardRunner
    correct: int  # which of the rewards says whether an answer is right
    coherence: CoherenceReward | None  # where completions are expected to have a form
    path: Path
    result: dict[str, Any]

    def missing(self) -> list[float]:
        """Temperatures that are asked for and not finished, from cold to hot."""
        done = {one["temperature"] for one in self.result["drawn"]}
        return [temperature for temperature in self.temperatures if temperature not in done]


def prepare(args: Sequence[str], config_class: Any) -> Prepared:
    """Parse, load rewards, tokenizer and data, check that all fits.

    Raises:
        SettingsError, ValueError, TypeError: name the setting, what it was, what was expected and the cure.
    """
    _refuse_what_is_not_read(args, config_class)
    options, config, given = parse(args, config_class, SamplingOptions)
    better = AT_ONCE | (DEMO_SETTINGS if options.model == DEMO else {}) | {"samples": config.num_generations}
    for name, value in (better | (QUICK if options.quick else {})).items():
        if name not in given:
            setattr(options if hasattr(options, name) else config, name, value)
    if options.quick and "output" not in given:
        options.output = options.output.replace(".json", "_quick.json")
    temperatures = sampling_temperatures(options.temperatures)
    check_count("samples", options.samples, "A group has several: 8.")
    check_count("rounds", options.rounds, "More rounds, smaller errors: 4.")
    check_count("prompts", options.prompts, "Errors are taken over prompts: 100.")
    check_count("ngram", options.ngram, "It is the length of the n-grams: 4.")
    check_count("warm_start_steps", options.warm_start_steps, "The demonstration takes 160.")
    if not 0 < options.keep < 1:
        raise SettingsError(f"keep is {options.keep!r}; expected a number above 0 and below 1: the share of the highest pass@1, 0.5.")
    path = Path(options.output)
    check_output(path)
    task = _task(options, config.prompt_seed)
    rewards = load_rewards(options.rewards, task)
    runner = RewardRunner(
        rewards,
        weights=config.reward_weights,
        timeout=config.reward_timeout,
        on_error=config.reward_on_error,
        isolation=config.reward_isolation,
    )
    correct = _correct(options, runner, rewards, task)
    check_options(config.sampler, config.sampler_options or {})
    tokenizer = _demo_tokenizer() if options.model == DEMO else load_tokenizer(options)
    if tokenizer.eos_token_id is None:
        raise SettingsError("the tokenizer has no eos_token_id; expected one: a completion ends with it.")
    assert options.dataset is not None
    chat = config.chat_template_kwargs
    rows = prompt_rows(options.dataset, options.dataset_split, task, options, tokenizer, runner, chat=chat, limit=options.prompts)
    if len(rows) < options.prompts and "prompts" in given:
        warnings.warn(f"prompts is {options.prompts}, and there are {len(rows)} rows that can be taken.", stacklevel=2)
    new = {
        "kind": "temperature_sampling",
        "quick": options.quick,
        "machine": describe(),
        "options": _told(options, config, rows),
        "correct": runner.names[correct],
        "drawn": [],
    }
    result = begun(path, new, "sampling", KEPT)
    return Prepared(options, config, temperatures, tokenizer, rows, runner, correct, _coherence(rewards), path, result)


def threads_of(prepared: Prepared) -> Any:
    """A context: the demonstration's model gains nothing from a second thread, and where cores are shared loses by it."""
    if prepared.options.model == DEMO:
        from grpo_fast.demo.run import one_thread

        return one_thread()
    return nullcontext()


def load_model(prepared: Prepared) -> Any:
    """The model, on the device of the configuration."""
    if prepared.options.model == DEMO:
        from grpo_fast.demo.run import Options, warm_started

        return warm_started(Options(seed=prepared.config.seed, warm_start_steps=prepared.options.warm_start_steps)).model
    from grpo_fast.models.loading import load_policy

    model, _ = load_policy(prepared.options.model, prepared.tokenizer, **prepared.config.loading_options())
    return model.to(prepared.config.device)


def _refuse_what_is_not_read(args: Sequence[str], config_class: Any) -> None:
    """On the command line; a settings file is that of a training, and has more."""
    in_file = bool(args) and not args[0].startswith("-")
    read = {*SAMPLED_BY, *CHOOSES_SAMPLER, *(each.name for each in fields(SamplingOptions))} - set(NOT_READ)
    for name in parse_overrides(args[1:] if in_file else args, config_class, SamplingOptions):
        if name not in read:
            cure = f"--{INSTEAD[name]}." if name in INSTEAD else "leave it out, or in the settings file."
            raise SettingsError(f"command line: --{name} is nothing that sampling reads; expected what --help shows. Cure: {cure}")


def _told(options: SamplingOptions, config: Any, rows: Any) -> dict[str, Any]:
    """Every setting that decides what is drawn and what is said of it, and a digest of the rows: a name may come to hold others."""
    own = [each.name for each in fields(options) if each.name not in (*NOT_READ, "temperatures", "output", "quick")]
    told = {name: getattr(options, name) for name in own} | {name: getattr(config, name) for name in SAMPLED_BY if name != "data_seed"}
    for name in ("sampler_options", "model_init_kwargs"):
        if isinstance(told[name], dict):
            told[name] = {key: value for key, value in told[name].items() if key not in SECRET}
    digest = hashlib.sha256(json.dumps([dict(row) for row in rows], sort_keys=True, default=str).encode()).hexdigest()[:16]
    return told | {"prompt_seed": config.prompt_seed, "digest_of_rows": digest}


def _task(options: SamplingOptions, seed: int) -> Task | None:
    if options.dataset == DEMO:
        from grpo_fast.data.tasks.sorting import question, split_questions
        from grpo_fast.rewards import accuracy_reward

        return Task([question(digits) for digits in split_questions()[1]], accuracy_reward)
    return make_task(options.dataset or "", size=min(options.dataset_size, options.prompts), seed=seed)


def _demo_tokenizer() -> Any:
    from grpo_fast.data.tasks.sorting import make_tokenizer

    return make_tokenizer()


def _correct(options: SamplingOptions, runner: RewardRunner, rewards: list[Any], task: Task | None) -> int:
    asked = list(options.rewards or ["task"])
    if options.correct is not None:
        for names in (asked, runner.names):
            if options.correct in names:
                return names.index(options.correct)
        raise SettingsError(f"correct is {options.correct!r}; expected one of the rewards: {', '.join(asked)}.")
    for i, reward in enumerate(rewards):
        if runner.names[i] in RIGHT or (task is not None and reward is task.reward):
            return i
    raise SettingsError(
        f"no reward says whether an answer is right: rewards are {', '.join(asked)}; expected accuracy, math, or a task's own. "
        "Cure: --correct NAME, of a reward whose full marks are 1."
    )


def _coherence(rewards: list[Any]) -> CoherenceReward | None:
    """The one that is asked for, or that which belongs to the format reward; None: nothing says that completions have a form."""
    for reward in rewards:
        if isinstance(reward, CoherenceReward):
            return reward
    return next((CoherenceReward(think_opened=reward.think_opened) for reward in rewards if isinstance(reward, FormatReward)), None)
