"""Layers that read the same input, as one: the same numbers wherever their weights lie, and no copy where joined."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from test_unet import CONFIGS, error, inputs, perturb
from tiny import UNET, load_unet

from rapm.layers import Linear
from rapm.lora import LoRA
from rapm.memory.low_precision import MODES, low_precision
from rapm.stacks import Stack, join, together
from rapm.unet import UNet


def layers(count: int, out: int = 6, inputs: int = 5) -> list[Linear]:
    made = [Linear(inputs, out).requires_grad_(False) for _ in range(count)]
    for i, layer in enumerate(made):
        layer.name = f"layer{i}"
    return made


def storages(stack: Stack) -> set[int]:
    return {layer.weight.untyped_storage()._cdata for layer in stack.layers}


def test_joined_weights_are_views_of_one() -> None:
    stack = Stack(layers(3))
    before = [layer.weight.clone() for layer in stack.layers]
    parameters = [layer.weight for layer in stack.layers]
    assert len(storages(stack)) == 3
    copied, _ = stack.frozen()
    stack.join()
    assert len(storages(stack)) == 1
    view, bias = stack.frozen()
    assert view.data_ptr() == stack.layers[0].weight.data_ptr() and bias.shape == (18,)
    assert torch.equal(view, copied) and all(map(torch.equal, parameters, before))
    assert all(a is layer.weight for a, layer in zip(parameters, stack.layers, strict=True))
    place = view.data_ptr()
    stack.join()  # once more changes nothing
    assert stack.frozen()[0].data_ptr() == place


def test_what_is_trained_or_apart_is_put_together_at_each_use() -> None:
    parts = [torch.randn(2, 3), torch.randn(4, 3)]
    assert torch.equal(together(parts), torch.cat(parts))
    join(parts)
    assert together(parts).data_ptr() == parts[0].data_ptr()
    assert torch.equal(together(parts[::-1]), torch.cat(parts[::-1]))  # in another order
    leaf = parts[0].clone().requires_grad_()
    together([leaf, parts[1]]).sum().backward()
    assert torch.equal(leaf.grad, torch.ones(2, 3))


@pytest.mark.parametrize("joined", [False, True])
def test_a_stack_is_its_layers(joined: bool) -> None:
    stack = Stack(layers(3))
    if joined:
        stack.join()
    x, rank = torch.randn(4, 5), 2
    lora = {layer.name: (torch.randn(rank, 5), torch.randn(6, rank)) for layer in stack.layers[:2]}
    expected = {layer.name: layer(x, lora) for layer in stack.layers}  # each on its own; the third has no update
    for base in (None, stack.base(x)):
        made = stack(x, lora, base)
        assert made.keys() == expected.keys()
        assert all(torch.allclose(made[name], y, atol=1e-6) for name, y in expected.items())
    assert torch.allclose(stack.wide(x, lora), torch.cat([*expected.values()], -1), atol=1e-6)
    assert torch.allclose(stack.wide(x, None), torch.cat([layer(x) for layer in stack.layers], -1), atol=1e-6)
    assert stack.low_rank({"another": lora["layer0"]}) is None


@pytest.mark.parametrize("family", CONFIGS)
def test_the_unet_with_and_without(family: str) -> None:
    """Joined, and with the text's keys at hand: the same output and the same gradient of the LoRA."""
    torch.manual_seed(0)
    unet = perturb(UNet(CONFIGS[family])).requires_grad_(False)
    lora = LoRA(unet, 2)
    with torch.no_grad():
        lora.flat += 0.05 * torch.randn_like(lora.flat)
    z, t, text = inputs(CONFIGS[family], 2, (16, 16))

    def run(keys: list[torch.Tensor] | None) -> list[torch.Tensor]:
        out = unet(z, t, text, lora.views(torch.float32), keys=keys)
        return [out, *torch.autograd.grad(out.square().sum(), lora.flat)]

    apart = run(None)
    assert all(len(storages(stack)) == len(stack.layers) for stack in unet.stacks)
    unet.join()
    assert all(len(storages(stack)) == 1 for stack in unet.stacks)
    for found in (run(None), run(unet.text_keys(text))):
        assert all(error(a, b) < 1e-5 for a, b in zip(found, apart, strict=True))
    features = unet.features(z, t, text, keys=unet.text_keys(text))
    assert all(error(a, b) < 1e-5 for a, b in zip(features, unet.features(z, t, text), strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", UNET)
def test_laid_weights_are_in_one_piece(family: str, mode: str) -> None:
    """One storage a dtype, stacks joined, the same numbers in the same parameters; from the meta device unfilled."""
    unet = low_precision(UNet(UNET[family]).to(torch.bfloat16).requires_grad_(False), mode)
    before = {name: (x, x.clone()) for name, x in unet.named_parameters()}
    with torch.device("meta"):
        empty = low_precision(UNet(UNET[family]).to(torch.bfloat16), mode)
    for laid in (unet.lay("cpu"), empty.lay("cpu")):
        by_dtype = defaultdict(set)
        for name, x in laid.named_parameters():
            by_dtype[x.dtype].add(x.untyped_storage()._cdata)
            assert x.dtype == before[name][1].dtype and x.shape == before[name][1].shape and not x.requires_grad
            assert x.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)
        assert set(map(len, by_dtype.values())) == {1} and len(by_dtype) == {"full": 1, "int8": 3, "nf4": 4}[mode]
        for stack in laid.stacks:
            for group in stack.groups():
                assert together(group).data_ptr() == group[0].data_ptr()
    for name, x in unet.named_parameters():
        assert x is before[name][0] and torch.equal(x, before[name][1])


def test_a_loaded_unet_is_joined(tiny_folders) -> None:
    unet = load_unet(tiny_folders["sdxl"] / "unet")
    assert unet.stacks and all(len(storages(stack)) == 1 for stack in unet.stacks)
    names = [name for stack in unet.stacks for name in stack.names]
    assert len(names) == len(set(names)) and set(names) <= set(unet.lora_targets())
