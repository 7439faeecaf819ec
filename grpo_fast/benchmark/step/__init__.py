"""Suite ``step`` (``grpo-fast bench-step``): whole optimizer steps of TRL's GRPOTrainer against those of this package's."""
