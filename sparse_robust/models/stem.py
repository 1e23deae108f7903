"""A stem for small images: ResNets without the early reduction by four."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparse_robust.errors import UsageError
from sparse_robust.masks import unwrap
from sparse_robust.models.spec import attach_spec, find_spec
from sparse_robust.seeding import seeded

FAMILIES = "ResNet, ResNet-C/D/S/T, ResNeXt, SE-ResNet and the other variants of timm's ResNet class"


def use_small_stem(model: nn.Module, seed: int = 0) -> tuple[str, ...]:
    """Turn a ResNet's stem into the one for small images, in place, and return the names of weights this made new.

    The first convolution gets stride 1 and the max-pool goes, so that the feature map stays four times as wide and as
    high (He et al., 2016, section 4.2, use this stem on CIFAR-10). A plain 7x7 convolution becomes a fresh 3x3 one,
    initialised as timm does (He normal, fan out); a deep stem of 3x3 convolutions keeps all its weights. Calling it on
    a network that has the small stem changes nothing.

    Args:
        model: an instance of timm's ``ResNet`` class.
        seed: keys the initial values of a new convolution; the caller's random state is untouched.

    Returns:
        ``("conv1.weight",)`` where its values were given up (a mask for that weight no longer fits), else ``()``.

    Raises:
        UsageError: for any other family, naming those that have this stem.
    """
    from timm.models.resnet import ResNet  # here, so that importing this package stays light

    resnet: Any = unwrap(model)
    spec = find_spec(resnet)
    if not isinstance(resnet, ResNet):
        name = spec.name if spec else type(resnet).__name__
        raise UsageError(
            f"{name} has no small stem. Families that have it: {FAMILIES}. For others use stem='default' and larger "
            "images (resize=...)."
        )
    new = _unstride(resnet, seed)
    _record_reductions(resnet.feature_info)
    if spec is not None:
        attach_spec(model, spec.with_(stem="small"))
    return new


def stem_names(model: nn.Module) -> tuple[str, ...]:
    """Return the state-dict names whose shape depends on the stem: a ResNet's plain first convolution, else none."""
    first = getattr(model, "conv1", None)
    return ("conv1.weight",) if isinstance(first, nn.Conv2d) and hasattr(model, "layer1") else ()


def _unstride(model: Any, seed: int) -> tuple[str, ...]:
    """Remove both reductions of the stem and return the names of the weights that are new."""
    model.maxpool = nn.Identity()
    if not isinstance(model.conv1, nn.Conv2d):
        model.conv1[0].stride = (1, 1)
        return ()
    old = model.conv1
    if old.kernel_size == (3, 3) and old.stride == (1, 1):
        return ()
    with seeded("stem", seed):
        new = nn.Conv2d(old.in_channels, old.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    model.conv1 = new.to(device=old.weight.device, dtype=old.weight.dtype).train(old.training)
    return ("conv1.weight",)


def _record_reductions(feature_info: list[dict[str, Any]]) -> None:
    """Correct timm's record of how much smaller each feature map is than the image."""
    if feature_info[0]["reduction"] == 2:
        feature_info[0]["reduction"] = 1
        for stage in feature_info[1:]:
            stage["reduction"] //= 4
