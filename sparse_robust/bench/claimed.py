"""The claims, with their bounds. `sparse_robust.bench.claims` says what a claim is."""

from __future__ import annotations

from dataclasses import replace

from sparse_robust.bench.claims import Claim, Figure

PERCEPTRON = "perceptron 784-4096-4096-10"
MASKED = Figure("masked-step", PERCEPTRON, "MaskedSGD")
CUT = Figure("select", "100,000,000 weights in 50 layers", "cut")
BITS = 8 / 10_000_000  # per byte, of the masks of mask-storage

CPU = (
    Claim(
        "cpu", "global selection over 1e8 weights is faster than torch.nn.utils.prune.global_unstructured",
        replace(CUT, route="torch.nn.utils.prune"), CUT, at_least=4,
    ),
    Claim(
        "cpu", "... and takes a small share of its extra peak memory",
        replace(CUT, column="memory_bytes"), replace(CUT, route="torch.nn.utils.prune", column="memory_bytes"),
        at_most=0.10, form="{:.3f}x",
    ),
    Claim(
        "cpu", "a masked training step costs hardly more than the dense one",
        MASKED, replace(MASKED, route="dense"), at_most=1.03, form="{:.3f}x",
    ),
    Claim(
        "cpu", "... and is faster than the step under torch.nn.utils.prune",
        replace(MASKED, route="torch.nn.utils.prune"), MASKED, at_least=1.15,
    ),
    Claim(
        "cpu", "packed masks in memory",
        Figure("mask-storage", "in memory, 10,000,000", "Masks", "memory_bytes"), at_most=1.0, scale=BITS,
        form="{:.3f} bit",
    ),
    Claim(
        "cpu", "masks of 90 % sparsity in a file",
        Figure("mask-storage", "in a file, 10,000,000", "Masks.save", "memory_bytes"), at_most=0.6, scale=BITS,
        form="{:.3f} bit",
    ),
)  # fmt: skip

COPY = Figure("ceilings", "copy", "copy_", "per_second")
PRODUCT = Figure("ceilings", "8192x8192x8192 bf16 product", "matmul", "per_second")
BANDWIDTH = 0.85  # of the copy's
NOISE = 0.97  # two runs of the same kernel differ by as much

# Kernels at their largest size, with the case of the operation that times them. All are bound by memory but those of
# ARITHMETIC, whose instructions take longer than their bytes (tests/kernels/test_sass.py counts them).
ARITHMETIC = {"pgd_step.l2_random_start, 256x3x224x224"}
KERNELS = {
    "pgd-step": (
        "pgd_step.linf_step, 256x3x224x224",
        "pgd_step.linf_step_normalized, 256x3x224x224",
        "pgd_step.linf_project, 256x3x224x224",
        "pgd_step.linf_random_start, 256x3x224x224",
        "pgd_step.l2_step, 256x3x224x224",
        "pgd_step.l2_random_start, 256x3x224x224",
        "pgd_step.rgd_step, 256x3x224x224",
        "rng.philox_uniform, 256x3x224x224",
    ),
    "masks": (
        "masks.zero_, 300,000,000 weights",
        "masks.masked_copy, 300,000,000 weights",
        "masks.pack_bits, 300,000,000 weights",
        "masks.unpack_bits, 300,000,000 weights",
    ),
}
# Bytes a weight of a step with masks, masked gradients and a bf16 copy.
OPTIMIZERS = {"SGD": 26.125, "AdamW": 34.125}


def of_kernel(operation: str, case: str) -> tuple[Claim, Claim]:
    name = case.partition(",")[0]
    ours = Figure(operation, case, "auto")
    return (
        Claim(
            "cuda", f"{name}: share of the copy bandwidth", replace(ours, column="per_second"), COPY,
            at_least=None if case in ARITHMETIC else BANDWIDTH, form="{:.0%}",
        ),
        Claim("cuda", f"{name}: torch.compile / ours", replace(ours, route="torch.compile"), ours, at_least=NOISE),
    )  # fmt: skip


def of_optimizer(name: str, size: float) -> Claim:
    ours = Figure("optimizer-step", f"{name}, 300,000,000 weights", f"Masked{name}", "per_second")
    text = f"optim.{name.lower()}_: share of the copy bandwidth"
    return Claim("cuda", text, ours, COPY, at_least=BANDWIDTH, scale=size, form="{:.0%}")


RESNET50 = Figure("robust-step", "resnet50 PGD-3 256x3x224x224", "replica, captured")
RESNET18 = Figure("robust-step", "resnet18 PGD-10 128x3x32x32", "replica, captured")
# Floating-point operations an image: of the whole step (k times forward and the image's gradient, then training), and
# of training alone.
FLOPS = {RESNET50: (73.4e9, 24.3e9), RESNET18: (25.5e9, 3.33e9)}


def of_training(name: str, ours: Figure) -> tuple[Claim, Claim]:
    """Attack efficiency (1: the attack's passes run as well as training does) and the share of the bf16 products."""
    rate, (total, training) = replace(ours, column="per_second"), FLOPS[ours]
    without = replace(rate, route="no attack")
    return (
        Claim("cuda", f"{name}: attack efficiency", rate, without, scale=total / training),
        Claim("cuda", f"{name}: MFU, of the measured bf16 product", rate, PRODUCT, scale=total, form="{:.0%}"),
    )


CUDA = (
    *(claim for operation, cases in KERNELS.items() for case in cases for claim in of_kernel(operation, case)),
    *(of_optimizer(name, size) for name, size in OPTIMIZERS.items()),
    Claim(
        "cuda", "ResNet-50 PGD-3 step in bf16: naive fp32 loop / ours",
        replace(RESNET50, route="naive loop, fp32"), RESNET50, at_least=3,
    ),
    Claim(
        "cuda", "ResNet-50 PGD-3 step in bf16", replace(RESNET50, column="per_second"), at_least=2500,
        form="{:,.0f} images/s",
    ),
    Claim(
        "cuda", "ResNet-18 32x32 PGD-10 step: uncaptured / captured", replace(RESNET18, route="replica"), RESNET18,
        at_least=2,
    ),
    *of_training("ResNet-50 PGD-3", RESNET50),
    *of_training("ResNet-18 PGD-10", RESNET18),
)  # fmt: skip

CLAIMS = (*CPU, *CUDA)
