"""What one training run is: everything that its result depends on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from precoder.channel import Scenario, WeightLaw


@dataclass(frozen=True)
class TrainConfig:
    """Two runs with equal configurations and numbers of ranks give equal bits.

    `users` cycles step by step: one K in a batch, so nothing is padded. `samples` limits training to so many
    channels, drawn once; None draws fresh ones every step. The learning rate rises for `warm_up` steps, then falls
    to `final_rate` of `rate` along a cosine.
    """

    network: str = "upe-phase"
    users: tuple[int, ...] = (8, 5, 8, 7, 8, 6, 8, 3, 8, 4, 8, 2)  # K=8 is the hardest to learn
    antennas: int = 8
    snr_db: tuple[float, float] = (0.0, 20.0)
    weights: WeightLaw = "mixed"
    samples: int | None = None
    seed: int = 0
    steps: int = 12000
    batch: int = 128
    rate: float = 2e-3
    warm_up: int = 100
    final_rate: float = 0.02
    clip: float = 1.0
    average: float = 0.998
    precision: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "users", tuple(self.users))
        object.__setattr__(self, "snr_db", tuple(self.snr_db))
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        if not self.users:
            raise ValueError("users is empty: give the numbers of users to train for")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples is at least 1, got {self.samples}")
        if self.rate <= 0:
            raise ValueError(f"rate is positive, got {self.rate}")
        if self.precision not in ("float32", "float64"):
            raise ValueError(f'precision is "float32" or "float64", got {self.precision!r}')
        for users in self.users:
            self.scenario(users)

    def scenario(self, users: int) -> Scenario:
        """What the channels of a step with so many users are drawn from."""
        return Scenario(users, self.antennas, self.snr_db, self.weights)

    def users_of(self, step: int) -> int:
        """K of one step."""
        return self.users[step % len(self.users)]

    def to_json(self) -> dict[str, Any]:
        """As a dictionary of JSON's types."""
        return asdict(self) | {"users": list(self.users), "snr_db": list(self.snr_db)}

    def differences(self, other: TrainConfig) -> list[str]:
        """ "name: own value, other's value" of each field that differs."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return [f"{name}: {own!r}, {others!r}" for name, own, others in pairs if own != others]


_CELL = TrainConfig(snr_db=(10.0, 10.0), weights="uniform", steps=3000, batch=256)

# What `python -m precoder train TASK` trains. The steps fit into ten minutes of one core, so with room to spare on two.
TASKS = {
    "mixed": TrainConfig(),
    "k8": replace(_CELL, users=(8,)),
    "k8short": replace(_CELL, users=(8,), steps=600),
    "k4": replace(_CELL, users=(4,)),
    "few": replace(_CELL, users=(4,), samples=1000),
}
