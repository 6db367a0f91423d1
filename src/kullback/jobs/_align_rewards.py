"""The reward that a configuration names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kullback.align.nash_policy import judged
from kullback.align.rewards import ArithmeticReward, ExactReward, ModelReward, PatternReward, Reward, load_reward
from kullback.core.errors import ConfigError

if TYPE_CHECKING:
    from kullback.jobs.align import RewardConfig

__all__ = ["EqualRewards", "chosen_reward"]

_IN_A_ROW = 5


class EqualRewards:
    """Says so, once, when all completions of five batches in a row have had one and the same reward."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell, self.value, self.seen, self.told = tell, 0.0, 0, False

    def __call__(self, rewards: Tensor) -> None:
        value = float(rewards[0])
        alike = len(rewards) > 1 and bool((rewards == value).all())
        self.seen = (self.seen + 1 if self.seen and value == self.value else 1) if alike else 0
        self.value = value
        if self.seen == _IN_A_ROW and not self.told:
            self.told = True
            self.tell(
                f"every completion of {_IN_A_ROW} batches in a row has the reward {value:g}, which tells none from "
                "another: check the reward, or give easier or harder prompts"
            )


def chosen_reward(config: RewardConfig, *, needed: bool, device: Any = "cpu") -> Reward | None:
    """The reward function, a model on the device, or None where none is named and none needed.

    Raises ConfigError for a name that means nothing or a pattern that would do nothing, and what loading raises.
    """
    name, pattern = config.name, config.pattern
    if pattern and name not in ("exact", "regex"):
        raise ConfigError(f"reward.pattern does nothing to the reward {name or '(none)'!r}: exact and regex take it")
    if config.pairwise and ":" not in name:
        raise ConfigError("reward.pairwise needs a judge of your own: module:function or file.py:function")
    if config.remembered != type(config)().remembered and not config.pairwise:
        raise ConfigError("reward.remembered is of a judge of pairs: set reward.pairwise, or leave it out")
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
        found = load_reward(name)
        return judged(found, remembered=config.remembered) if config.pairwise else found
    if Path(name).expanduser().is_dir():
        return ModelReward(Path(name).expanduser(), device=device)
    raise ConfigError(
        f"there is no reward {name!r}: exact, regex, arithmetic, module:function, file.py:function, or the directory "
        "of a reward model"
    )
