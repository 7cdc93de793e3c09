"""The masked layer, and when and what its schedule prunes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.errors import UserError
from data_pipeline.settings import build_settings
from pretrain.model import Decoder, ModelSettings, initialize_
from pretrain.model.initialize import Draw
from pretrain.model.linear.kinds.dense import DenseLinear
from pretrain.model.linear.kinds.magnitude_pruned import MagnitudePrunedLinear, MagnitudePrunedSettings
from pretrain.model.scheduled import schedules

IN, OUT = 10, 7
GRADUAL = {"begin_step": 4, "end_step": 10, "every_steps": 3}


def settings(**changes: Any) -> MagnitudePrunedSettings:
    given = {"kind": "magnitude_pruned", "sparsity": 0.5, "gradual": GRADUAL, **changes}
    return build_settings(MagnitudePrunedSettings, given, "test")


def layer(share: float = 0.5, dtype: torch.dtype = torch.float64) -> MagnitudePrunedLinear:
    """A layer of which about ``share`` is pruned, at random."""
    made = settings().make(IN, OUT, 0.3)
    assert isinstance(made, MagnitudePrunedLinear)
    made.load_state_dict(made.initial_values(Draw("layer", 1)))
    assert made.mask.all()
    made.mask &= torch.rand(OUT, IN, generator=torch.Generator().manual_seed(2)) >= share
    return made.to(dtype)


def results(made: nn.Module, weight: nn.Parameter, y_of: Any) -> list[Tensor]:
    """The output and the gradients of input and weight."""
    x = torch.randn(2, 3, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(weight.dtype)
    x.requires_grad_()
    made.zero_grad()
    y = y_of(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    return [y.detach(), x.grad, weight.grad.clone()]


def test_output_and_gradients_are_those_of_the_masked_weight() -> None:
    made = layer()
    found = results(made, made.weight, made)
    expected = results(made, made.weight, lambda x: F.linear(x, made.weight * made.mask))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert found[2][~made.mask].eq(0).all()
    assert found[2][made.mask].ne(0).all()


def test_the_gradients_are_those_of_finite_differences() -> None:
    made = layer()

    def product(x: Tensor, weight: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(made, {"weight": weight}, (x,))
        return output

    x = torch.randn(2, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(product, (x, made.weight.detach().clone().requires_grad_()))


def test_what_a_pruned_entry_holds_has_no_part_in_anything() -> None:
    made = layer()
    before = results(made, made.weight, made)
    with torch.no_grad():
        values = torch.tensor([float("nan"), float("inf"), 1e300], dtype=torch.float64)
        made.weight[~made.mask] = values.repeat(OUT * IN)[: int((~made.mask).sum())]
    for one, other in zip(before, results(made, made.weight, made), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_nothing_pruned_it_is_the_dense_layer_to_the_bit(dtype: torch.dtype) -> None:
    made, dense = layer(0.0, dtype), DenseLinear(IN, OUT, 0.3).to(dtype)
    dense.weight.data = made.weight.data.clone()
    for one, other in zip(results(made, made.weight, made), results(dense, dense.weight, dense), strict=True):
        assert torch.equal(one, other)


def test_no_second_weight_is_kept_for_the_backward_pass() -> None:
    made, kept = layer(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        made(torch.ones(3, IN, dtype=torch.float64).requires_grad_())
    own = {made.weight.data_ptr(), made.mask.data_ptr()}
    assert [tuple(each.shape) for each in kept if each.data_ptr() not in own] == [(3, IN)]


def test_the_cost_is_that_of_the_layer() -> None:
    made, cost = layer(), settings().cost(IN, OUT)
    assert cost.parameters == cost.multiplied == made.weight.numel()
    assert (cost.activations, cost.buffer_bytes) == (0, made.mask.nbytes)


def pruned_decoder(*rules: dict[str, Any]) -> Decoder:
    shape = {"hidden_size": 8, "layers": 2, "heads": 2, "intermediate_size": 12, "init_std": 0.3}
    model = Decoder(build_settings(ModelSettings, {**shape, "linear": list(rules)}, "test"), 20)
    initialize_(model, 3)
    return model


def update(model: Decoder, step: int) -> None:
    """What the engine does before a step."""
    for schedule, modules in schedules(model):
        if schedule.due(step):
            schedule.update(step, modules, lambda name: model.get_parameter(name).detach())


def masks(model: Decoder) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def rule(**changes: Any) -> dict[str, Any]:
    return {"kind": "magnitude_pruned", "sparsity": 0.5, "gradual": GRADUAL, **changes}


def test_a_schedule_prunes_when_it_is_due() -> None:
    model, pruned = pruned_decoder(rule(modules=["feed_forward.*"])), []
    for step in range(13):
        update(model, step)
        pruned.append([int((~mask).sum()) for mask in masks(model).values()])
    # of 96 weights, ⌊96 · 0.5 (1 - (1 - 1/2)³)⌋ = 42 at half time
    expected = [0] * 7 + [42] * 3 + [48] * 3
    assert pruned == [[count] * 6 for count in expected]


def test_each_layer_by_itself_or_all_of_a_rule_together() -> None:
    each = pruned_decoder(rule(scope="layer"))
    together = pruned_decoder(rule(scope="global", layers="0"), rule(scope="global", layers="1", sparsity=0.25))
    with torch.no_grad():
        for model in (each, together):
            for name, parameter in model.named_parameters():
                if "query" in name:
                    parameter.mul_(4)
    for model in (each, together):
        update(model, 10)
    assert all(int((~mask).sum()) == mask.numel() // 2 for mask in masks(each).values())
    for block, share in (("blocks.0.", 0.5), ("blocks.1.", 0.25)):
        found = {name: mask for name, mask in masks(together).items() if name.startswith(block)}
        assert sum(int((~mask).sum()) for mask in found.values()) == share * sum(
            mask.numel() for mask in found.values()
        )
        kept = [together.get_parameter(f"{name[:-4]}weight")[mask].abs().min() for name, mask in found.items()]
        gone = [together.get_parameter(f"{name[:-4]}weight")[~mask].abs().max() for name, mask in found.items()]
        assert max(gone) <= min(kept)
        query = found[f"{block}attention.query.mask"]
        assert float((~query).float().mean()) < share / 2


def test_what_is_pruned_does_not_come_back() -> None:
    model = pruned_decoder(rule(sparsity=0.8))
    update(model, 7)
    before = masks(model)
    with torch.no_grad():
        for name, mask in before.items():
            model.get_parameter(f"{name[:-4]}weight")[~mask] = 100.0
    update(model, 10)
    for name, mask in masks(model).items():
        assert not (mask & ~before[name]).any()
        assert int((~mask).sum()) == int(0.8 * mask.numel())


def test_nothing_changes_without_a_schedule() -> None:
    assert not schedules(
        pruned_decoder(
            rule(gradual=None, mask_from="somewhere"),
        )
    )
    assert len(schedules(pruned_decoder(rule(layers="0"), rule(layers="1")))) == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"gradual": None}, "exactly one of mask_from and gradual"),
        ({"mask_from": "runs/a/checkpoints/step_000000001"}, "exactly one of mask_from and gradual"),
        ({"gradual": {**GRADUAL, "end_step": 4}}, "end_step 4 must come after begin_step 4"),
        ({"gradual": {**GRADUAL, "end_step": 9}}, "the nearest end_step is 7 or 10"),
        ({"gradual": {**GRADUAL, "every_steps": 8}}, "the nearest end_step is 12"),
        ({"gradual": {**GRADUAL, "initial_sparsity": 0.6}}, "initial_sparsity 0.6 is above sparsity 0.5"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        settings(**changes)


def test_pruning_must_lie_within_the_run() -> None:
    settings().check_steps(4, 11)
    for first, total in ((5, 11), (0, 10)):
        with pytest.raises(ValueError, match=f"the run goes from {first} to {total}"):
            settings().check_steps(first, total)
    settings(gradual=None, mask_from="somewhere").check_steps(5, 6)
