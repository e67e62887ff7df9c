"""Transfer: which parts of a pretrained network learn, how fast, and from when on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from medvision.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

Transfer = Literal["auto", "probe", "frozen", "finetune", "scratch"]

FEW_EXAMPLES = 16
"""Below this mean count of examples a class, ``auto`` leaves the encoder as it is."""
ENCODER_RATE = 0.1
HEAD_WARMUP_SHARE = 0.1
OFFSET_RATE = 0.1
"""Rate of the branches that predict a convolution's offsets: Zhu et al., Deformable ConvNets v2, CVPR 2019.

There in section 3.2. In Dai et al., Deformable Convolutional Networks, ICCV 2017, it is 1 (section 2.3).
"""
POOLING_OFFSET_RATE = 0.01
"""Rate of the layer that predicts the offsets of deformable RoI pooling: Dai et al., section 2.3."""


@dataclass(frozen=True)
class TransferPlan:
    """What learns, and why. Names are those of modules of the network, as in "backbone".

    ``frozen`` modules never change. ``encoder`` modules do not change before ``warmup_share`` (0..1) of
    the run, and learn at ``encoder_rate`` times the head's rate from then on.
    """

    mode: Transfer
    why: str
    frozen: tuple[str, ...] = ()
    encoder: tuple[str, ...] = ()
    warmup_share: float = HEAD_WARMUP_SHARE
    encoder_rate: float = ENCODER_RATE

    def held(self, progress: float) -> tuple[str, ...]:
        """Return the modules that must not change at ``progress`` (0..1) of the run."""
        return self.frozen + (self.encoder if progress < self.warmup_share else ())


def choose_transfer(
    mode: Transfer, examples: Mapping[str, int], pretrained: bool, *, must_learn: bool = False
) -> tuple[Transfer, str]:
    """Return what ``mode`` comes to, never "auto", and a sentence that says why.

    ``examples`` counts the training examples of each class; ``pretrained``: are there weights to
    transfer. With a handful of examples a trained encoder forgets more than it learns (Wang et al.,
    Frustratingly Simple Few-Shot Object Detection, ICML 2020: up to 10 a class); with more, fine-tuning
    is not worse than a start from nothing, and sooner there (Raghu et al., Transfusion, NeurIPS 2019;
    He et al., Rethinking ImageNet Pre-training, ICCV 2019). The encoder sees all classes, so their mean
    count decides, unless the encoder ``must_learn``, as it was changed. UsageError for a transfer of nothing.
    """
    if mode != "auto":
        if mode != "scratch" and not pretrained:
            raise UsageError(
                f"--transfer {mode} needs pretrained weights; none are given.",
                do="Pass --weights NAME or --weights FILE, or --transfer scratch.",
            )
        return mode, f"{mode}: as asked for."
    if not pretrained:
        return "scratch", "scratch: there are no pretrained weights to start from."
    if must_learn:
        return "finetune", "finetune: other norms or convolutions than the weights' must learn."
    counted = _counted(examples)
    if sum(examples.values()) < FEW_EXAMPLES * max(len(examples), 1):
        return "frozen", (
            f"frozen: {counted}, under {FEW_EXAMPLES}; so few would spoil a pretrained encoder."
        )
    return "finetune", (
        f"finetune: {counted}, at least {FEW_EXAMPLES}; enough to fit the encoder to these scans, slowly."
    )


def _counted(examples: Mapping[str, int]) -> str:
    if not examples:
        return "no examples"
    total, rarest = sum(examples.values()), min(examples, key=lambda name: examples[name])
    text = f"{total} examples of {len(examples)} classes ({rarest} has {examples[rarest]})"
    return f"{text}, {total / len(examples):.1f} a class"


def plan_transfer(
    network: nn.Module,
    mode: Transfer,
    why: str,
    *,
    encoder: Sequence[str] = ("backbone",),
    outputs: Sequence[str] = ("head",),
) -> TransferPlan:
    """Return the plan of ``mode``, as :func:`choose_transfer` gave it, for ``network``.

    ``encoder`` names the modules that hold pretrained weights, ``outputs`` those closest to the answer.
    probe trains the outputs alone; frozen all but the encoder; finetune warms the rest up before the
    encoder joins in at a tenth of the rate (Kumar et al., Fine-Tuning can Distort Pretrained Features,
    ICLR 2022: first the head, then all); scratch everything alike. UsageError for "auto" and for a name
    that the network does not have.
    """
    names = {name for name, _ in network.named_modules()}
    for name in (*encoder, *outputs):
        if name not in names:
            raise UsageError(f"The network has no part {name!r} to transfer.")
    if mode == "probe":
        return TransferPlan(mode, why, frozen=_all_but(network, outputs))
    if mode == "frozen":
        return TransferPlan(mode, why, frozen=tuple(encoder))
    if mode == "finetune":
        return TransferPlan(mode, why, encoder=tuple(encoder))
    if mode == "scratch":
        return TransferPlan(mode, why)
    raise UsageError("auto must be resolved by choose_transfer before a plan is made.")


def _all_but(network: nn.Module, kept: Sequence[str], prefix: str = "") -> tuple[str, ...]:
    """Return the largest modules that hold none of the modules ``kept``."""
    found: list[str] = []
    for name, child in network.named_children():
        path = prefix + name
        if path in kept:
            continue
        if any(one.startswith(path + ".") for one in kept):
            found.extend(_all_but(child, kept, path + "."))
        else:
            found.append(path)
    return tuple(found)


def set_training(network: nn.Module, plan: TransferPlan, progress: float) -> None:
    """Put ``network`` into training mode as ``plan`` has it at ``progress`` (0..1) of the run.

    Held modules are in eval mode (their batch norms count nothing, their dropout is off) and need no
    gradient: they stay the same to the bit. Call it before each step: it depends on nothing
    but its arguments, so that a resumed run goes on as it would have.
    """
    network.train()
    held = plan.held(progress)
    for name in plan.frozen + plan.encoder:
        module = network.get_submodule(name)
        module.train(name not in held)
        for parameter in module.parameters():
            parameter.requires_grad_(name not in held)
            if name in held:
                parameter.grad = None


def parameter_groups(
    network: nn.Module, plan: TransferPlan, weight_decay: float
) -> list[dict[str, Any]]:
    """Return the optimizer's groups, by falling rate, without what is frozen.

    ``rate`` in a group is what the run's learning rate is multiplied by: 1 for the head, less for the encoder
    and for the offsets of deformable layers, in the encoder the product of both. Norms and biases are
    not decayed: it would only shift what the data say.
    """
    slow, frozen = _of(network, plan.encoder), _of(network, plan.frozen)
    offsets = _offset_rates(network)
    by_kind: dict[tuple[float, float], list[nn.Parameter]] = {}
    for value in network.parameters():
        if id(value) in frozen:
            continue
        rate = plan.encoder_rate if id(value) in slow else 1.0
        rate *= offsets.get(id(value), 1.0)
        decay = weight_decay if value.ndim > 1 else 0.0
        by_kind.setdefault((rate, decay), []).append(value)
    # Decayed ones first: a resumed run must find the groups in the order that it saved them in.
    order = sorted(by_kind, key=lambda kind: (-kind[0], -kind[1]))
    return [{"params": by_kind[kind], "weight_decay": kind[1], "rate": kind[0]} for kind in order]


def _of(network: nn.Module, names: Sequence[str]) -> set[int]:
    return {id(value) for name in names for value in network.get_submodule(name).parameters()}


def _offset_rates(network: nn.Module) -> dict[int, float]:
    """Return the rate of each parameter, by its id, that predicts offsets."""
    # The settings take a type from this file, and they are read without torch.
    from medvision.models.deformable import DeformConv2d
    from medvision.models.deformable_roi import DeformRoIAlign

    rates: dict[int, float] = {}
    for part in network.modules():
        if isinstance(part, DeformConv2d):
            rates[id(part.offset_weight)] = rates[id(part.offset_bias)] = OFFSET_RATE
        elif isinstance(part, DeformRoIAlign):
            rates.update((id(value), POOLING_OFFSET_RATE) for value in part.fc.parameters())
    return rates
