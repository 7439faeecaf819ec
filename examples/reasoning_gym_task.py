"""A task of the reasoning-gym package (pip install '.[tasks]'), which generates the questions and scores the answers.

python examples/reasoning_gym_task.py --task chain_sum --model Qwen/Qwen3-0.6B --steps 200
python examples/reasoning_gym_task.py --steps 2     # a tiny model with random weights, nothing to download
"""

from __future__ import annotations

import argparse

from tiny import tiny_model, tiny_tokenizer

from grpo_fast.rewards import format_reward
from grpo_fast.tasks import reasoning_gym_task
from grpo_fast.trainer import GRPOConfig, GRPOTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="chain_sum")
    parser.add_argument("--model", help="name or folder of a causal language model; default: a tiny model with random weights")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--output", default="runs/reasoning_gym")
    options = parser.parse_args()

    task = reasoning_gym_task(options.task, size=500)
    held_out = reasoning_gym_task(options.task, size=8, seed=1)
    tokenizer = None if options.model else tiny_tokenizer()
    args = GRPOConfig(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        num_generations=8,
        max_completion_length=512 if options.model else 16,
        dynamic_sampling_attempts=1,  # replace questions once if all completions have the same reward
        reward_weights=[1.0, 0.2],
        eval_rounds=2,
        logging_steps=1,
        log_completions=True,
        use_cpu=not options.model,
    )
    trainer = GRPOTrainer(
        options.model or tiny_model(tokenizer),
        [task.reward, format_reward],
        args,
        train_dataset=task.rows,
        eval_dataset=held_out.rows,
        processing_class=tokenizer,
    )
    trainer.train()
    print(trainer.evaluate())


if __name__ == "__main__":
    main()
