"""Where numbers first stopped being finite, in words.

On the way to training every stage is looked at on the host, once: weights when they are read, embeddings when they are
made, positions when they are solved and when they are read back. Within a slot, which is one graph, the losses and
norms that are there anyway tell: `Step.fault` keeps which of PROBES were not finite, and this says what that means.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

LOSSES = (
    "loss", "huber_rel", "huber_abs", "gen_rel", "gen_abs", "disc_rel", "disc_abs", "grad_norm", "head_grad_norm",
)  # fmt: skip
# What a slot is judged by: its losses and norms, and the sums of the last features of the student's position and of
# both targets. A number that is not finite in an earlier feature is in the last one too.
PROBES = (*LOSSES, "features_fake", "features_rel", "features_abs")
SHARED = tuple(name for name in PROBES if not name.endswith("grad_norm"))  # what ranks tell each other beside gradients
SIDES = {"rel": "relative", "abs": "absolute"}  # of D_rel and D_abs, in this order everywhere


def finite(x: Tensor) -> bool:
    """Whether every number is; asks the device."""
    return not x.is_floating_point() or bool(x.isfinite().all())


def first_stage(bad: Collection[str]) -> str:
    """The first stage of a slot that was not finite, when `bad` of PROBES were not; "" for none.

    A stage spoils what comes after it, so what it alone cannot have spoiled tells it from the next.
    """
    if {"huber_rel", "huber_abs"} <= {*bad}:
        return "the network's output at the student's position"
    for short, side in SIDES.items():
        if f"huber_{short}" in bad:
            return f"the {side} target" if f"features_{short}" in bad else f"huber_{short}, the {side} distance"
    if "features_fake" in bad:
        return "the features of the student's position"
    for short, side in SIDES.items():
        if f"features_{short}" in bad:
            return f"the features of the {side} target"
    for short in SIDES:
        if {f"gen_{short}", f"disc_{short}"} <= {*bad}:
            return f"the logits of D_{short}"
    for short in SIDES:
        for term, words in (("gen", "the student's term against"), ("disc", "the loss of")):
            if f"{term}_{short}" in bad:
                return f"{term}_{short}, {words} D_{short}"
    last = {"loss": "the sum of the student's losses", "grad_norm": "the LoRA's gradient",
            "head_grad_norm": "the heads' gradient"}  # fmt: skip
    return next((words for name, words in last.items() if name in bad), "")


def describe(fault: Sequence[int], steps: int, world: int = 1) -> tuple[int, str]:
    """`Step.fault` as a list: its iteration, from 1, and the slot and the stage in words; N slots, of `world` ranks."""
    number, slot = divmod(fault[0] - 1, steps)
    iteration = number // world
    bad = [name for name, flag in zip(PROBES, fault[1:], strict=True) if flag]
    return iteration + 1, f"not finite in slot {slot + 1} of {steps}, which was skipped: {first_stage(bad)}"
