"""What a training step minimises: clean or adversarial cross-entropy, one small class for all regimes."""

from sparse_robust.objectives.regimes import REGIMES, Objective, Regime, build_objective

__all__ = ["REGIMES", "Objective", "Regime", "build_objective"]
