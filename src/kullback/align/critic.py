"""A critic beside a policy: what each place of a completion is worth, before its token is drawn.

    V_t = w h_t + b,  h_t the hidden state of which the law of token t is made

Shapes: B rows, T completion tokens, H hidden size; values [B, T], float32, in units of the reward.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kullback.core.errors import ConfigError
from kullback.models.heads import head_inputs, replaced_head

__all__ = ["Critic", "CriticKind", "add_critic"]

CriticKind = Literal["head", "shared", "model"]


class Critic(nn.Module):
    """A linear head, which begins at 0, on hidden states.

    kind "head": on the policy's, which are left as they are; "shared": on the policy's, which learn to tell values as
    well; "model": on those of a second transformer, which begins as a copy of the policy.
    """

    def __init__(self, policy: Any, kind: CriticKind) -> None:
        super().__init__()
        weight = policy.get_output_embeddings().weight
        self.kind = kind
        self.backbone = deepcopy(policy) if kind == "model" else None
        self.head = nn.Linear(weight.shape[1], 1, device=weight.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden: Tensor, ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
        """Values [B, T]; hidden: what the policy's head was given for ids [B, L + T], their last T + 1 at least."""
        length = completion_mask.shape[1]
        if self.backbone is not None:
            hidden = self._own(ids, attention_mask, length)
        elif self.kind == "head":
            hidden = hidden.detach()
        rows = hidden[:, -length - 1 : -1]
        with torch.autocast(rows.device.type, enabled=False):
            values = functional.linear(rows.float(), self.head.weight.float(), self.head.bias.float())
        return torch.where(completion_mask, values.squeeze(-1), 0.0)

    def _own(self, ids: Tensor, attention_mask: Tensor, length: int) -> Tensor:
        """The hidden states of the critic's own transformer, without its logits."""
        backbone: Any = self.backbone
        mask = attention_mask.long()
        with head_inputs(backbone) as heard, replaced_head(backbone, lambda hidden: hidden[..., :1]):
            backbone(
                input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False,
                logits_to_keep=length + 1,
            )  # fmt: skip
        return heard[-1]


def add_critic(policy: Any, kind: CriticKind) -> Critic:
    """A critic as a part of the policy, so that it is trained and sent along with it, and is not saved with it.

    Raises ConfigError for another kind, and for a model of its own where the policy has adapters.
    """
    if kind not in ("head", "shared", "model"):
        raise ConfigError(f"critic is head, shared or model, not {kind!r}")
    adapted = getattr(policy, "peft_config", None) is not None
    if adapted and kind == "model":
        raise ConfigError("a critic with a model of its own has no adapters: take critic head or shared")
    base = policy.get_base_model() if adapted else policy
    critic = Critic(base, kind)
    if critic.backbone is not None:
        # Its head is never used, and a weight without a gradient is one that processes would wait for.
        critic.backbone.set_output_embeddings(nn.Linear(critic.head.in_features, 1, bias=False).requires_grad_(False))
    base.critic = critic
    ignored = getattr(base, "_keys_to_ignore_on_save", None) or []
    base._keys_to_ignore_on_save = [*ignored, *(f"critic.{name}" for name in critic.state_dict())]
    return critic
