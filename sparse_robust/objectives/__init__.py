"""What a training step minimises, one regime each: clean, fast, adversarial, TRADES, MART..., in one mechanism."""

from sparse_robust.objectives.objective import Objective
from sparse_robust.objectives.regimes import REGIMES, Regime, Settings, build_objective

__all__ = ["REGIMES", "Objective", "Regime", "Settings", "build_objective"]
