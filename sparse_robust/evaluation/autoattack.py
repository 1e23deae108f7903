"""AutoAttack under the interface its users know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from sparse_robust.attacks.autoattack import MEMBERS, VERSIONS, autoattack, member
from sparse_robust.attacks.base import EngineAttack
from sparse_robust.attacks.budget import Budget, parse_eps
from sparse_robust.attacks.context import Model
from sparse_robust.errors import UsageError, unknown
from sparse_robust.evaluation.console import EvaluationProgress, evaluation_table
from sparse_robust.evaluation.evaluate import Evaluation, evaluate
from sparse_robust.evaluation.record import eps_text

_CUSTOM = (*VERSIONS, "custom")


@dataclass(slots=True)  # a wrong name raises
class Settings:
    """What may be changed of an ensemble's members before a run; None keeps the version's value."""

    n_restarts: int | None = None
    n_iter: int | None = None
    n_queries: int | None = None
    n_target_classes: int | None = None
    eot_iter: int | None = None
    seed: int | None = None

    def given(self) -> dict[str, int]:
        """Return the values that are set, under the names that attacks have for them."""
        given: dict[str, int] = {name: value for name, value in asdict(self).items() if value is not None}
        return {"steps" if name == "n_iter" else name: value for name, value in given.items()}

    def apply(self, attack: EngineAttack) -> EngineAttack:
        """Return the attack with those of these values that it has."""
        changes = {name: value for name, value in self.given().items() if hasattr(attack, name)}
        changed: EngineAttack = replace(attack, **changes)  # type: ignore[type-var]
        return changed


class AutoAttack:
    """The standard evaluation of adversarial robustness (Croce and Hein, 2020), with verdicts that hold.

    Verdicts are the same for every batch size and order, the evaluation can be resumed, and images leave a batch as
    soon as they are fooled. Settings of the members can be changed before a run, as in
    ``adversary.apgd.n_restarts = 1``: ``apgd``, ``apgd_targeted``, ``fab`` and ``square``.

    Args:
        model: maps images [n, C, H, W] in [0, 1] to logits; an nn.Module or any function.
        norm: ``Linf``, ``L2`` or ``L1``.
        eps: a number, or text such as ``8/255``.
        seed: any integer; None is 0.
        verbose: show how the evaluation goes, and its result, on standard error.
        attacks_to_run: names out of ``MEMBERS``, for version ``custom``.
        version: ``standard``, ``plus``, ``rand`` or ``custom``.
        device: where the model is, if it does not tell.
        log_path: file that the table of results is added to.
        precision: ``fp32`` or ``bf16``: how attacks look for candidates, which fp32 then confirms.

    After a run, ``evaluation`` holds the whole result.
    """

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: str | float = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[str] = (),
        version: str = "standard",
        is_tf_model: bool = False,
        device: torch.device | str | None = None,
        log_path: str | Path | None = None,
        *,
        precision: str = "fp32",
    ) -> None:
        if is_tf_model:
            raise UsageError("TensorFlow models are not supported; give a function on torch tensors.")
        if version not in _CUSTOM:
            raise unknown("version of AutoAttack", version, _CUSTOM)
        if attacks_to_run and version != "custom":
            raise UsageError(f"version {version!r} has its own attacks: attacks_to_run is for version='custom'.")
        for name in attacks_to_run:
            member(name, norm=norm)
        self.epsilon = parse_eps(eps)
        Budget(norm, self.epsilon)
        self.model, self.norm, self.version, self.seed, self.verbose = model, norm, version, seed, verbose
        self.attacks_to_run = list(attacks_to_run) or list(VERSIONS.get(version, ()))
        self.device, self.log_path, self.precision = device, log_path, precision
        self.apgd, self.apgd_targeted, self.fab, self.square = Settings(), Settings(), Settings(), Settings()
        self.evaluation: Evaluation | None = None

    def attacks(self) -> tuple[EngineAttack, ...]:
        """Return the attacks of a run as they are set now."""
        seed = 0 if self.seed is None else self.seed
        known = {}
        if self.version != "custom":
            known = {attack.name: attack for attack in autoattack(self.version, norm=self.norm, seed=seed)}
        if not self.attacks_to_run:
            raise UsageError(f"version 'custom' needs attacks_to_run: some of {', '.join(MEMBERS)}.")
        chosen = [known.get(name) or member(name, norm=self.norm, seed=seed) for name in self.attacks_to_run]
        for settings in (self.apgd, self.apgd_targeted, self.fab, self.square):
            members = [attack for attack in chosen if self._settings(attack.name) is settings]
            for name in settings.given() if members else ():
                if not any(hasattr(attack, name) for attack in members):
                    raise UsageError(f"{', '.join(attack.name for attack in members)} has no setting {name!r}.")
        return tuple(self._settings(attack.name).apply(attack) for attack in chosen)

    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | Path | None = None,
    ) -> Any:
        """Return adversarial images like x_orig: those that fool the model, and x_orig where none was found.

        Args:
            x_orig: float32 images [n, C, H, W] in [0, 1], on any device.
            y_orig: int64 labels [n].
            bs: images handed to the device at a time. It changes no verdict.
            return_labels: return (images, predictions on them).
            state_path: verdict file; an interrupted evaluation goes on from it. It holds verdicts, not images: those
                that were fooled before the interruption come back as x_orig, with the prediction on it.

        Raises:
            UsageError: for wrong arguments.
        """
        x_adv, labels = self._run(self.attacks(), x_orig, y_orig, bs, state_path)
        return (x_adv, labels) if return_labels else x_adv

    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False
    ) -> dict[str, Any]:
        """Return the same for each attack alone, on all images, by its name."""
        results = {attack.name: self._run((attack,), x_orig, y_orig, bs, None) for attack in self.attacks()}
        return {name: result if return_labels else result[0] for name, result in results.items()}

    def clean_accuracy(self, x_orig: Tensor, y_orig: Tensor, bs: int = 250) -> float:
        """Return the share of images that are classified correctly without an attack."""
        return evaluate(self.model, self._batches(x_orig, y_orig, bs), check=False).clean

    def _run(
        self, attacks: Sequence[EngineAttack], x: Tensor, y: Tensor, bs: int, state_path: str | Path | None
    ) -> tuple[Tensor, Tensor]:
        x_adv = x.detach().clone()

        def collect(ids: Tensor, images: Tensor) -> None:
            x_adv[ids.to(x.device)] = images.to(x.device)

        with EvaluationProgress(self.verbose) as shown:
            self.evaluation = result = evaluate(
                self.model, self._batches(x, y, bs), attacks, self.epsilon, file=state_path,
                precision=self.precision, on_images=collect, on_progress=shown,
            )  # fmt: skip
        self._report(result)
        broken = result.per_image.step >= 0
        labels = result.per_image.clean_prediction.clone()
        if bool(broken.any()):
            at = broken.nonzero().flatten()
            loader = self._batches(x_adv[at.to(x.device)], y[at.to(y.device)], bs)
            labels[at] = evaluate(self.model, loader, check=False).per_image.clean_prediction
        return x_adv, labels.to(y.device)

    def _batches(self, x: Tensor, y: Tensor, bs: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if not isinstance(bs, int) or bs < 1:
            raise UsageError(f"bs is the number of images at a time, an integer of at least 1, got {bs!r}.")
        if len(x) != len(y):
            raise UsageError(f"as many labels as images are needed, got {len(y)} labels and {len(x)} images.")
        ids = torch.arange(len(x))
        where = x.device if self.device is None else torch.device(self.device)
        for part in ids.split(bs):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            yield x[rows].to(where), y[rows].to(where), part

    def _settings(self, name: str) -> Settings:
        if name == "apgd-t":
            return self.apgd_targeted
        return {"apgd": self.apgd, "fab": self.fab, "square": self.square}[name.split("-")[0]]

    def _report(self, result: Evaluation) -> None:
        title = f"AutoAttack {self.version}, {self.norm} eps {eps_text(self.epsilon)}, {len(result):,} images"
        if self.verbose:
            Console(stderr=True).print(evaluation_table(result, norm=self.norm, title=title))
        if self.log_path is not None:
            with open(self.log_path, "a", encoding="utf-8") as file:
                Console(file=file, width=120).print(evaluation_table(result, norm=self.norm, title=title))
