"""The task of ``grpo-fast demo`` with the trainer: a small model, warm-started on flawed answers, learns to sort digits.

It takes about a minute on one CPU core.

python examples/train_demo.py --steps 60 --seed 0
"""

from __future__ import annotations

import argparse

import torch

from grpo_fast.data.tasks.sorting import make_tokenizer, question, split_questions
from grpo_fast.demo.model import make_model
from grpo_fast.demo.options import MAX_NEW_TOKENS, REWARDS
from grpo_fast.demo.teacher import Teacher
from grpo_fast.demo.warm_start import imitate
from grpo_fast.trainer import GRPOConfig, GRPOTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warm-start-steps", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--eval-rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/train_demo")
    options = parser.parse_args()

    torch.set_num_threads(1)  # a second thread does not make a model of this size faster
    torch.manual_seed(options.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    training, held_out = split_questions()
    start = {"steps": options.warm_start_steps, "max_new_tokens": MAX_NEW_TOKENS, "seed": options.seed}
    imitate(model, tokenizer, training, Teacher(), **start)

    args = GRPOConfig(
        options.output,
        seed=options.seed,
        max_steps=options.steps,
        temperature=options.temperature,
        per_device_train_batch_size=256,  # 32 prompts, 8 completions each
        num_generations=8,
        max_completion_length=MAX_NEW_TOKENS,
        learning_rate=3e-4,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=3,
        adam_beta2=0.98,
        epsilon_high=0.28,
        reward_weights=list(REWARDS.values()),
        gradient_checkpointing=False,
        per_device_eval_batch_size=96,
        eval_rounds=options.eval_rounds,
        logging_steps=5,
        save_strategy="no",
        use_cpu=True,
    )
    trainer = GRPOTrainer(
        model,
        list(REWARDS),
        args,
        train_dataset=[question(digits) for digits in training],
        eval_dataset=[question(digits) for digits in held_out[:96]],
        processing_class=tokenizer,
    )
    accuracy = "eval_rewards/accuracy_reward"
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for when, found in (("before", before), ("after", after)):
        print(f"accuracy at T = 0.6 {when}: {found[f'{accuracy}/mean']:.3f} ± {found[f'{accuracy}/se']:.3f}")


if __name__ == "__main__":
    main()
