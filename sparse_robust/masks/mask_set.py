"""One bit a weight, by name: an immutable value with exact counts, set algebra, a digest and a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_robust.errors import FileError, UsageError, unknown
from sparse_robust.masks import storage
from sparse_robust.masks.prunable import prunable_weights
from sparse_robust.masks.shards import Shard, whole_shape
from sparse_robust.masks.wrappers import find_parameters, held_parts
from sparse_robust_kernels import masks as kernel

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Masks:
    """Named bit masks over the prunable weights of a model; a set bit is a kept weight.

    Make one with `from_bools`, `full`, `from_packed`, `load`, or by pruning. It never changes, lives on the CPU at one
    bit a weight, and is compared and hashed by content. The order of the names is the order in which ties are broken;
    it is kept in files but has no part in equality or in the digest.

    Sparsity is counted by the mask alone, so a weight that happens to be zero does not count as pruned.
    """

    _packed: Mapping[str, Tensor]
    _shapes: Mapping[str, Shape]

    @classmethod
    def from_bools(cls, keep: Mapping[str, Tensor]) -> Masks:
        """Make masks from bool tensors by name, True where the weight is kept."""
        for name, mask in keep.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise UsageError(f"the mask of {name} must be a bool tensor, got {got}; write `mask != 0`.")
        packed = {name: kernel.pack_bits(mask.detach().reshape(-1)).cpu() for name, mask in keep.items()}
        return cls.from_packed(packed, {name: tuple(mask.shape) for name, mask in keep.items()})

    @classmethod
    def full(cls, source: nn.Module | Mapping[str, Tensor]) -> Masks:
        """Return masks that keep everything: of a model's `prunable_weights`, or of tensors by name."""
        weights = prunable_weights(source) if isinstance(source, nn.Module) else source
        return cls.from_bools({name: torch.ones(whole_shape(w), dtype=torch.bool) for name, w in weights.items()})

    @classmethod
    def from_packed(cls, packed: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> Masks:
        """Make masks from packed bits (the inverse of `tensors` and `shapes`); ``shapes`` gives the order.

        Args:
            packed: uint8 ``[ceil(numel / 8)]`` by name, little-endian bit order, spare bits 0.
            shapes: shape of each weight by name.

        Raises:
            UsageError: if names, types, lengths or spare bits are not so; the message names the tensor.
        """
        if not shapes:
            raise UsageError("masks need at least one tensor, got none.")
        if packed.keys() != shapes.keys():
            missing, extra = sorted(shapes.keys() - packed.keys()), sorted(packed.keys() - shapes.keys())
            raise UsageError(f"masks do not match their shapes: missing {missing[:5]}, unexpected {extra[:5]}.")
        ordered = {name: tuple(int(size) for size in shape) for name, shape in shapes.items()}
        for name, shape in ordered.items():
            bits, numel = packed[name], prod(shape)
            size = -(-numel // 8)
            if bits.dtype != torch.uint8 or bits.shape != (size,):
                got = f"{bits.dtype} {tuple(bits.shape)}"
                raise UsageError(f"the mask of {name}, shape {shape}, takes uint8 ({size},) when packed, got {got}.")
            if numel % 8 and int(bits[-1]) >> (numel % 8):
                raise UsageError(f"the mask of {name} has bits set beyond its {numel} weights.")
        return cls({name: packed[name].detach().cpu().clone() for name in ordered}, ordered)

    @classmethod
    def load(cls, path: str | Path) -> Masks:
        """Read what `save` wrote, and verify all of it.

        Raises:
            FileError: if the file is missing, damaged, of another kind or version, or disagrees with its own counts or
                digest; the message names the file and what is wrong.
        """
        return cls.from_stored(*storage.read(path), source=path)

    @classmethod
    def from_stored(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, source: str | Path) -> Masks:
        """Make masks from what `tensors` and `metadata` returned, verifying all of it; ``source`` is for messages.

        Raises:
            FileError: as `load`.
        """
        layers, digest = storage.parse(metadata, source)
        try:
            masks = cls.from_packed(tensors, {name: shape for name, shape, _ in layers})
        except UsageError as error:
            raise FileError(f"{source} is damaged: {error}") from error
        for (name, _, expected), (_, _, kept, _) in zip(layers, masks.layers(), strict=True):
            if kept != expected:
                raise FileError(f"{source} is damaged: {name} should keep {expected} weights and its bits keep {kept}.")
        if masks.digest() != digest:
            raise FileError(f"{source} is damaged: its digest should be {digest}, and its bits have {masks.digest()}.")
        return masks

    # --- content

    def __getitem__(self, name: str) -> Tensor:
        """Return the mask of one weight as a new bool tensor on the CPU, in the weight's shape; True is kept."""
        return self.on(name, "cpu")

    def on(self, name: str, device: torch.device | str) -> Tensor:
        """Return the mask of one weight as a new bool tensor on a device; only the bits travel."""
        if name not in self._shapes:
            raise unknown("masked weight", name, self._shapes)
        shape = self._shapes[name]
        return kernel.unpack_bits(self._packed[name].to(device), prod(shape)).view(shape)

    def on_shard(self, name: str, shard: Shard, device: torch.device | str | None = None) -> Tensor:
        """Return the mask of a part of one weight, in the part's shape: bool, on its device unless told otherwise."""
        if name not in self._shapes:
            raise unknown("masked weight", name, self._shapes)
        first, skip = divmod(shard.start, 8)
        count = shard.tensor.numel()
        packed = self._packed[name][first : first + -(-(skip + count) // 8)].to(device or shard.tensor.device)
        return kernel.unpack_bits(packed, skip + count)[skip:].reshape(shard.tensor.shape)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        """Return the number of masked tensors."""
        return len(self._shapes)

    def names(self) -> tuple[str, ...]:
        """Return the parameter names, in layer order."""
        return tuple(self._shapes)

    def shapes(self) -> dict[str, Shape]:
        """Return the shape of each weight, in layer order."""
        return dict(self._shapes)

    def only(self, names: Iterable[str]) -> Masks:
        """Return the masks of some weights, in the order given."""
        names = list(names)
        for name in names:
            if name not in self._shapes:
                raise unknown("masked weight", name, self._shapes)
        return Masks.from_packed({n: self._packed[n] for n in names}, {n: self._shapes[n] for n in names})

    # --- counts

    @cached_property
    def _kept(self) -> dict[str, int]:
        return {name: int(kernel.count_bits(bits)) for name, bits in self._packed.items()}

    def numel(self) -> int:
        """Return the number of prunable weights."""
        return sum(prod(shape) for shape in self._shapes.values())

    def count(self) -> int:
        """Return the number of kept weights."""
        return sum(self._kept.values())

    @property
    def density(self) -> float:
        """Kept weights over prunable weights, 0 to 1."""
        return self.count() / max(self.numel(), 1)

    @property
    def sparsity(self) -> float:
        """Pruned weights over prunable weights, 0 to 1."""
        return (self.numel() - self.count()) / max(self.numel(), 1)

    def layers(self) -> list[tuple[str, Shape, int, int]]:
        """Return (name, shape, kept, numel) of each weight, in layer order."""
        return [(name, shape, self._kept[name], prod(shape)) for name, shape in self._shapes.items()]

    # --- identity and algebra

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self._shapes):
            digest.update(f"{name}\0{self._shapes[name]}\0".encode())
            digest.update(self._packed[name].numpy().tobytes())
        return digest.hexdigest()

    def digest(self) -> str:
        """Return the SHA-256 of names, shapes and bits, in name order, as 64 hexadecimal digits."""
        return self._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __eq__(self, other: object) -> bool:
        return self._digest == other._digest if isinstance(other, Masks) else NotImplemented

    def __le__(self, other: Masks) -> bool:
        """Whether every weight kept here is kept there (the masks are nested). Names and shapes must be the same."""
        self._check_same(other)
        return all(not (bits & ~other._packed[name]).any() for name, bits in self._packed.items())

    def __and__(self, other: Masks) -> Masks:
        """Return what both keep."""
        self._check_same(other)
        return Masks({name: bits & other._packed[name] for name, bits in self._packed.items()}, self._shapes)

    def __or__(self, other: Masks) -> Masks:
        """Return what either keeps."""
        self._check_same(other)
        return Masks({name: bits | other._packed[name] for name, bits in self._packed.items()}, self._shapes)

    def __invert__(self) -> Masks:
        """Return the complement: what is pruned here is kept there."""
        return Masks.from_bools({name: ~self[name] for name in self})

    def iou(self, other: Masks) -> float:
        """Return the overlap of the kept sets, intersection over union, 0 to 1; two empty sets overlap by 1."""
        union = (self | other).count()
        return (self & other).count() / union if union else 1.0

    def chance_iou(self, other: Masks, *, layerwise: bool = False) -> float:
        """Return the overlap to expect of independent random masks of these two densities.

        With densities a and b it is ab / (a + b - ab); for equal ones, d / (2 - d). With ``layerwise``, the random
        masks have the densities of every layer.
        """
        self._check_same(other)
        pairs = [(kept, other._kept[name], numel) for name, _, kept, numel in self.layers() if numel]
        groups = pairs if layerwise or not pairs else [(self.count(), other.count(), self.numel())]
        both = sum(a * b / numel for a, b, numel in groups)
        either = sum(a + b for a, b, _ in groups) - both
        return both / either if either else 1.0

    def __repr__(self) -> str:
        kept = f"{self.count():,} of {self.numel():,} weights kept"
        return f"Masks({len(self)} tensors, {kept}, sparsity {100 * self.sparsity:.2f} %)"

    # --- use

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Set the pruned weights of a model to +0.0, in place. Everything else keeps its bits.

        Of a model under FSDP2 or ZeRO-3 every process does so with its own part. The separate fp32 weights that
        DeepSpeed's optimizer holds are `sparse_robust.enforce`'s to mask.

        Raises:
            UsageError: if a weight is missing or has another shape; the model is unchanged then.
        """
        weights = find_parameters(model, self._shapes)
        for name, weight in weights.items():
            for part in held_parts(weight):
                kernel.zero_([part.tensor], [self.on_shard(name, part)])

    # --- files

    def tensors(self) -> dict[str, Tensor]:
        """Return the packed bits by name: uint8 ``[ceil(numel / 8)]`` on the CPU, copies."""
        return {name: bits.clone() for name, bits in self._packed.items()}

    def metadata(self) -> dict[str, str]:
        """Return what a file must say beside `tensors`: format, version, layers with their counts, digest."""
        return storage.describe([(name, shape, kept) for name, shape, kept, _ in self.layers()], self.digest())

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically: a random mask of 90 % sparsity takes 0.48 bit a weight."""
        storage.write(path, self.tensors(), self.metadata())

    def _check_same(self, other: Masks) -> None:
        if not isinstance(other, Masks):
            raise UsageError(f"expected Masks, got {type(other).__name__}.")
        if self._shapes == other._shapes:
            return
        for name in (*self._shapes, *other._shapes):
            mine, theirs = self._shapes.get(name), other._shapes.get(name)
            if mine != theirs:
                raise UsageError(f"these masks belong to different models: {name} is {mine} here and {theirs} there.")
