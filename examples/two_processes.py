"""Data parallelism: the same script on several processes or GPUs. For the same completions, their number does not change loss and gradient.

accelerate launch --num_processes 2 examples/two_processes.py                    # two GPUs
accelerate launch --multi_gpu --num_processes 2 examples/two_processes.py --cpu  # two processes on a CPU (--cpu of launch wants MPI)
"""

from __future__ import annotations

import argparse
import gc

from tiny import tiny_model, tiny_tokenizer

from grpo_fast.rewards import accuracy_reward, format_reward
from grpo_fast.tasks import arithmetic_task
from grpo_fast.trainer import GRPOConfig, GRPOTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--output", default="runs/two_processes")
    options = parser.parse_args()

    tokenizer = tiny_tokenizer()
    args = GRPOConfig(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=4,  # with two processes, a group of 8 completions is divided between both
        gradient_accumulation_steps=2,
        num_generations=8,
        max_completion_length=16,
        logging_steps=1,
        save_strategy="no",
        use_cpu=options.cpu,
    )
    trainer = GRPOTrainer(
        tiny_model(tokenizer),
        [accuracy_reward, format_reward, lambda completion_ids, **columns: [len(set(ids)) / 16 for ids in completion_ids]],
        args,
        train_dataset=arithmetic_task(100).rows,
        processing_class=tokenizer,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        print(f"{trainer.accelerator.num_processes} processes, losses {losses}")
    trainer.accelerator.end_training()  # closes the process group; otherwise processes may exit first, with a warning


if __name__ == "__main__":
    main()
    gc.collect()  # reference cycles of the trainer keep the process group alive: end its threads before the interpreter exits
