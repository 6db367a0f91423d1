"""The reward that a configuration names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kullback.align.nash_policy import judged
from kullback.align.rewards import ArithmeticReward, ExactReward, ModelReward, PatternReward, Reward, load_reward
from kullback.core.errors import ConfigError

if TYPE_CHECKING:
    from kullback.jobs.align import RewardConfig

__all__ = ["chosen_reward"]


def chosen_reward(config: RewardConfig, *, needed: bool) -> Reward | None:
    """The reward function, or None where none is named and none needed.

    Raises ConfigError for a name that means nothing or a pattern that would do nothing, and what loading raises.
    """
    name, pattern = config.name, config.pattern
    if pattern and name not in ("exact", "regex"):
        raise ConfigError(f"reward.pattern does nothing to the reward {name or '(none)'!r}: exact and regex take it")
    if config.pairwise and ":" not in name:
        raise ConfigError("reward.pairwise needs a judge of your own: module:function or file.py:function")
    if not name:
        if needed:
            raise ConfigError(
                "this method learns from rewards and none is named: exact, regex, arithmetic, module:function, "
                "file.py:function, or the directory of a reward model"
            )
        return None
    if name == "exact":
        return ExactReward(pattern or None)
    if name == "regex":
        if not pattern:
            raise ConfigError("reward regex looks for reward.pattern: set it")
        return PatternReward(pattern)
    if name == "arithmetic":
        return ArithmeticReward()
    if ":" in name:
        return judged(load_reward(name)) if config.pairwise else load_reward(name)
    if Path(name).expanduser().is_dir():
        return ModelReward(Path(name).expanduser())
    raise ConfigError(
        f"there is no reward {name!r}: exact, regex, arithmetic, module:function, file.py:function, or the directory "
        "of a reward model"
    )
