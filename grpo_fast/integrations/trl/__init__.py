"""TRL 1.15, 1.16 and unchanged newer ones: its GRPOTrainer with this package's loss, and this package's LM head for every trainer of TRL.

    from grpo_fast.integrations.trl import GRPOTrainer          # was: from trl import GRPOTrainer

    with fused_lm_head():                                       # GRPO, RLOO, DPO, SFT, KTO: trainers that ask for log-probabilities
        DPOTrainer(...).train()

Both use private parts of TRL. Importing this package therefore raises an ImportError if the installed version of TRL is older than those
that it was compared with, or newer and changed in these parts.
"""

from grpo_fast.integrations.versions import refuse_other_versions

refuse_other_versions(
    "trl",
    "grpo_fast.integrations.trl",
    "It uses TRL's private methods. Fix: with another version, call gf.grpo_loss in a subclass of your own (docs/plain.md).",
    required=True,
)

from grpo_fast.integrations.trl.grpo_trainer import GRPOTrainer  # noqa: E402
from grpo_fast.integrations.trl.lm_head import fused_lm_head  # noqa: E402

__all__ = ["GRPOTrainer", "fused_lm_head"]
