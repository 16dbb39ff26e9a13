"""Round a checkpoint's weights to float16 values, so that storing them as float16 loses nothing.

Rounding *after* the parity reference was fixed moves every activation a little, and where queries
start from the peaks of a map a near tie may then fall the other way. So the checkpoint itself is
rounded: what is evaluated, exported and compared are the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsgnn.export.half_precision import STORED_AS_HALF
from dsgnn.model import DSGNN


@torch.no_grad()
def round_weights(model: DSGNN) -> DSGNN:
    """In place: BatchNorm scales move into the convolutions before them (exporters fold them
    anyway), then every large weight becomes the nearest float16 value. Returns the model."""
    for conv, norm in _pairs(model):
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        norm.bias.sub_(norm.running_mean * scale)
        conv.weight *= scale[:, None, None, None]
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)
        norm.weight.fill_(1)
    for parameter in model.parameters():
        if parameter.numel() >= STORED_AS_HALF:
            parameter.copy_(parameter.half().float())
    return model


def _pairs(model: DSGNN) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Each convolution without bias and the BatchNorm that reads its output, seen in a forward
    pass."""
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # the tensor too: ids are used again
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def after(conv: nn.Conv2d, _: object, out: Tensor) -> None:
        made[id(out)] = conv, out

    def before(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in made and made[id(inputs[0])][0].bias is None:
            pairs.append((made[id(inputs[0])][0], norm))

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(after))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(before))
    try:
        model.eval()(torch.zeros(1, 3, 64, 64))
    finally:
        for hook in hooks:
            hook.remove()
    return pairs
