"""grpo_fast: the loss of Group Relative Policy Optimization (arXiv:2402.03300) in fused kernels, and a trainer on top of it."""

from importlib.util import find_spec

if find_spec("grpo_fast.kernels") is None:  # the folder kernels/fused, which the installation maps to this name
    raise ImportError(
        f"grpo_fast was imported from a source checkout that is not installed ({__path__[0]}). "
        "Run `pip install --no-build-isolation -e .` in it, or start Python elsewhere."
    )

from grpo_fast.head.api import linear_grpo_loss, linear_token_logprobs
from grpo_fast.head.modules import LinearGRPOLoss
from grpo_fast.loss.advantages import GroupAdvantages, group_advantages
from grpo_fast.loss.api import GRPOOutput, TokenLogprobs, grpo_loss, token_logprobs
from grpo_fast.loss.checks import debug_checks
from grpo_fast.loss.config import LOSS_TYPES, LossConfig
from grpo_fast.loss.corrections import off_policy_sequence_mask, rollout_weights, top_entropy_mask
from grpo_fast.loss.modules import GRPOLoss
from grpo_fast.loss.rejection import rejection_mask
from grpo_fast.loss.support import Support
from grpo_fast.models.api import linear_logprobs_from, linear_loss_from
from grpo_fast.models.lm_head import head_of
from grpo_fast.ops import extension
from grpo_fast.ops.backends import BackendStatus, backends, use_backend
from grpo_fast.ops.invariance import batch_invariant
from grpo_fast.version import __version__ as __version__

extension.load_prebuilt()  # takes milliseconds; a missing or broken extension is reported by backends() and is not an error here

__all__ = [
    "LOSS_TYPES",
    "BackendStatus",
    "GRPOLoss",
    "GRPOOutput",
    "GroupAdvantages",
    "LinearGRPOLoss",
    "LossConfig",
    "Support",
    "TokenLogprobs",
    "backends",
    "batch_invariant",
    "debug_checks",
    "group_advantages",
    "grpo_loss",
    "head_of",
    "linear_grpo_loss",
    "linear_logprobs_from",
    "linear_loss_from",
    "linear_token_logprobs",
    "off_policy_sequence_mask",
    "rejection_mask",
    "rollout_weights",
    "token_logprobs",
    "top_entropy_mask",
    "use_backend",
]
