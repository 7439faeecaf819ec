"""LoRA: only the adapter is trained. The reference policy of the KL penalty is the model without it, which needs no extra memory.

python examples/lora.py --model Qwen/Qwen3-0.6B --steps 200
python examples/lora.py --steps 4                   # a tiny model with random weights, nothing to download
"""

from __future__ import annotations

import argparse

from peft import LoraConfig
from tiny import tiny_model, tiny_tokenizer

from grpo_fast.rewards import accuracy_reward, format_reward
from grpo_fast.tasks import arithmetic_task
from grpo_fast.trainer import GRPOConfig, GRPOTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a causal language model; default: a tiny model with random weights")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", default="runs/lora")
    options = parser.parse_args()

    tokenizer = None if options.model else tiny_tokenizer()
    args = GRPOConfig(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=256 if options.model else 16,
        learning_rate=1e-5,
        beta=0.01,
        logging_steps=1,
        use_cpu=not options.model,
    )
    trainer = GRPOTrainer(
        options.model or tiny_model(tokenizer),
        [accuracy_reward, format_reward],
        args,
        train_dataset=arithmetic_task(500).rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.model.print_trainable_parameters()
    trainer.save_model()  # only the adapter


if __name__ == "__main__":
    main()
