"""The GRPO loss over logits: settings, formulas, validated inputs, public functions, advantages and corrections."""
