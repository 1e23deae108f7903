"""The ticket file: packed masks with the identity of their weights and their provenance."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from sparse_robust._version import __version__
from sparse_robust.errors import FileError, UsageError
from sparse_robust.files import canonical_json, parse_json, sha256_state
from sparse_robust.masks import Masks, fit_stem, storage, unwrap
from sparse_robust.masks.wrappers import find_parameters
from sparse_robust.models.spec import find_spec

FORMAT_VERSION = 1
TICKET = "ticket"


class TicketWarning(UserWarning):
    """A ticket is put on weights that it was not drawn from."""


@dataclass(frozen=True)
class Ticket:
    """Masks, and the weights they select from.

    A ticket file is a mask file (`Masks.load` reads it) whose metadata also says the rest.

    Attributes:
        masks: which weights are kept.
        base_sha256: `sparse_robust.files.sha256_state` of the pre-trained state dict (theta_p) the masks were drawn
        from.
        architecture: the model's specification, as `ModelSpec.to_dict` gives it.
        provenance: how it was found: finder, round, recipe, seed, source task.
        evaluations: records of what it reached, if any.
    """

    masks: Masks
    base_sha256: str
    architecture: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    evaluations: tuple[Mapping[str, Any], ...] = ()
    version: str = __version__
    """Of the package that made it."""

    @classmethod
    def of(cls, model: nn.Module, masks: Masks, provenance: Mapping[str, Any] | None = None) -> Ticket:
        """Return the ticket that ``masks`` draw from the weights that ``model`` has now.

        Raises:
            UsageError: if the masks belong to another architecture.
        """
        find_parameters(model, masks.shapes())
        spec = find_spec(model)
        return cls(
            masks=masks, base_sha256=sha256_state(unwrap(model).state_dict()),
            architecture=spec.to_dict() if spec else {}, provenance=dict(provenance or {}),
        )  # fmt: skip

    def with_evaluation(self, record: Mapping[str, Any]) -> Ticket:
        """Return the ticket with one more record of what it reached, such as `sparse-robust evaluate` writes.

        A record that is there already is not added again.

        Args:
            record: JSON values. Its ``ticket``, where it has one, must be the digest of these masks.

        Raises:
            UsageError: if the record is of another ticket or not made of JSON values.
        """
        of = record.get("ticket") if isinstance(record, Mapping) else None
        if of and of != self.masks.digest():
            raise UsageError(
                f"this evaluation is of the masks {str(of)[:16]}..., and the ticket holds {self.masks.digest()[:16]}..."
            )
        try:
            added = parse_json(canonical_json(dict(record)))
        except (TypeError, ValueError) as error:
            raise UsageError(f"an evaluation is a mapping of JSON values ({error}).") from error
        return self if added in self.evaluations else replace(self, evaluations=(*self.evaluations, added))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically: an eighth of a byte a weight at most, half of it at 90 % sparsity.

        Raises:
            UsageError: if architecture, provenance or evaluations are not made of JSON values.
            FileError: if the file cannot be written; what was there is unchanged.
        """
        about = {
            "format_version": FORMAT_VERSION,
            "base_sha256": self.base_sha256,
            "architecture": dict(self.architecture),
            "provenance": dict(self.provenance),
            "evaluations": [dict(e) for e in self.evaluations],
            "version": self.version,
        }
        try:
            described = canonical_json(about)
        except (TypeError, ValueError) as error:
            raise UsageError(f"a ticket describes itself in JSON values ({error}).") from error
        storage.write(path, self.masks.tensors(), {**self.masks.metadata(), TICKET: described})

    @classmethod
    def load(cls, path: str | Path) -> Ticket:
        """Read a ticket file and verify its masks.

        Raises:
            FileError: if it is missing, damaged, of a later version, or holds masks without a ticket's metadata.
        """
        tensors, metadata = storage.read(path)
        masks = Masks.from_stored(tensors, metadata, source=path)
        if TICKET not in metadata:
            raise FileError(
                f"{path} holds masks but is no ticket: it does not say which weights they belong to. Read it with "
                f"Masks.load."
            )
        try:
            about = parse_json(metadata[TICKET])
            version = int(about["format_version"])
            ticket = cls(
                masks=masks, base_sha256=str(about["base_sha256"]), architecture=dict(about["architecture"]),
                provenance=dict(about["provenance"]), evaluations=tuple(dict(e) for e in about["evaluations"]),
                version=str(about["version"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"{path} is damaged: its ticket metadata cannot be read ({error!r}).") from error
        if version > FORMAT_VERSION:
            raise FileError(
                f"{path} has ticket format {version}, this package reads up to {FORMAT_VERSION}: update sparse_robust."
            )
        return ticket

    def apply_(self, model: nn.Module) -> None:
        """Put the ticket on a model: its pruned weights become +0.0.

        A model whose weights are not those the ticket was drawn from draws a `TicketWarning`: the masks fit it, but it
        is no rewound subnetwork. Where only the stem differs it is left unmasked, with a warning.

        Raises:
            UsageError: if a weight is missing or has another shape (another architecture); the model is unchanged then.
        """
        same = sha256_state(unwrap(model).state_dict()) == self.base_sha256
        fit_stem(self.masks, model).apply_(model)
        if not same:
            warnings.warn(
                f"the ticket was drawn from other weights (sha256 {self.base_sha256[:12]}...) than this model's; "
                "load those first to get the subnetwork it stands for.",
                TicketWarning,
                stacklevel=2,
            )

    def verify(self, model: nn.Module) -> None:
        """Check that the ticket belongs to a model with exactly these weights.

        Raises:
            UsageError: if names or shapes differ, or the weights are others.
        """
        state = unwrap(model).state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        for name, shape in self.masks.shapes().items():
            if shapes.get(name) != shape:
                found = shapes.get(name, "no such weight")
                raise UsageError(
                    f"the ticket is for another architecture: {name} is {shape} there and {found} in the model."
                )
        self.require_base(sha256_state(state))

    def require_base(self, sha256: str) -> None:
        """Refuse weights that the ticket was not drawn from.

        Raises:
            UsageError: if ``sha256`` is not the ticket's.
        """
        if sha256 != self.base_sha256:
            raise UsageError(
                f"the ticket was drawn from weights with sha256 {self.base_sha256[:16]}..., these have "
                f"{sha256[:16]}...: "
                "give the weights file of the run that found it."
            )
