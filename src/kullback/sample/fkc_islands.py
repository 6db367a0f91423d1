"""Islands of Feynman-Kac correctors that exchange particles at times, which keeps an unlucky one from being lost.

Every so many steps each of R islands sends particles to the next one, around a ring. A particle takes its weight with
it, and the mass of the island that it comes from: with Z_r the mass of island r and w_rk its weights of mean one,

    u_rk = Z_r w_rk goes along,    then    Z_s <- mean_k u_sk,    w_sk <- u_sk / Z_s.

The weights u are only put into another order, so that their sum over all islands, which is what estimates rest on, is
what it was, exactly. Islands are no longer independent: standard errors over them are not either.

Shapes: R islands, K particles each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kullback.core.errors import ConfigError

if TYPE_CHECKING:
    from kullback.sample.fkc import FKCState

__all__ = ["Migration"]


@dataclass(frozen=True, slots=True)
class Migration:
    """An exchange of `share` of the particles of each island after each `every` steps, along a ring.

    Raises ConfigError for options out of range, and when called for a single island.

    >>> Migration(every=10, share=0.25).places(8, 0)
    tensor([0, 4])
    """

    every: int = 10
    share: float = 0.1

    def __post_init__(self) -> None:
        if self.every < 1 or not 0.0 < self.share <= 0.5:
            raise ConfigError(f"every is 1 or more and share in (0, 1/2], not {self.every} and {self.share}")

    def places(self, count: int, step: int) -> Tensor:
        """Whose particles leave, evenly spread, for those of one ancestor lie side by side; others at other steps."""
        leaving = max(1, round(self.share * count))
        spread = torch.arange(leaving) * count // leaving
        return (spread + step // self.every) % count

    def __call__(self, state: FKCState) -> FKCState:
        """The islands after an exchange."""
        islands, count = state.log_weights.shape
        if islands < 2:
            raise ConfigError("one island has nobody to exchange particles with: take num_swarms of 2 or more")
        places = self.places(count, state.step).to(state.log_weights.device)

        def exchanged(part: Tensor) -> Tensor:
            after = part.clone()
            after[:, places] = part[:, places].roll(1, 0)
            return after

        origins = exchanged(state.origins)
        origins[:, places] = (origins[:, places] + count) % (islands * count)  # seen from an island further on
        mass = state.log_z + state.log_z_start
        logs = exchanged(state.log_weights + mass.unsqueeze(1))
        mass = torch.logsumexp(logs, 1) - torch.log(torch.full_like(mass, count))
        return state._replace(
            particles=exchanged(state.particles), log_weights=logs - mass.unsqueeze(1), log_z=mass - state.log_z_start,
            origins=origins, error=exchanged(state.error),
        )  # fmt: skip
