"""The one injection: where the vector goes, that it goes there once, and what is refused."""

from __future__ import annotations

import pytest
import torch
from conftest import logits_by_hand, tiny_model
from torch import nn

from inbrief.contract.contract import Injection
from inbrief.io.errors import InbriefError
from inbrief.models.injection import add_norm_matched, check_vectors, injected, overwrite

OVERWRITE = Injection(method="embed_overwrite", scale=3.0)
ADD = Injection(method="residual_add", layer=1)
HOW = pytest.mark.parametrize("how", [OVERWRITE, ADD], ids=["overwrite", "add"])
MARK = 7


@pytest.fixture
def model():
    return tiny_model("qwen3", 40)


def ids_with_marker(rows: int, column: int = 2, width: int = 6) -> torch.Tensor:
    ids = torch.randint(10, 40, (rows, width), generator=torch.Generator().manual_seed(0))
    ids[:, column] = MARK
    return ids


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in model.modules())


# The arithmetic


def test_T8_overwriting_scales_to_the_norm_not_by_it():
    embeds, vectors = torch.randn(3, 5, 8), torch.randn(3, 8) * torch.tensor([[0.01], [1.0], [14_000.0]])
    out = overwrite(embeds, vectors, 2, 150.0)
    for i in range(3):
        assert float(out[i, 2].norm()) == pytest.approx(150, rel=1e-5)
        assert torch.allclose(out[i, 2], 150 * vectors[i] / vectors[i].norm(), rtol=1e-5)
    untouched = [0, 1, 3, 4]
    assert torch.equal(out[:, untouched], embeds[:, untouched])


def test_T7_adding_uses_the_norm_of_the_full_residual_of_each_row():
    hidden, vectors = torch.randn(3, 5, 8) * 20, torch.randn(3, 8)
    out = add_norm_matched(hidden, vectors, 4)
    for i in range(3):
        h, v = hidden[i, 4], vectors[i]
        assert torch.allclose(out[i, 4], h + h.norm() * v / v.norm(), rtol=1e-5, atol=1e-5)
    assert torch.equal(out[:, :4], hidden[:, :4])


def test_the_gradient_flows_through_the_residual_norm_too():
    h, v = torch.randn(1, 1, 8, dtype=torch.float64), torch.randn(1, 8, dtype=torch.float64)
    h = h.float().requires_grad_()
    out = add_norm_matched(h, v, 0)
    out[0, 0, 0].backward()
    unit = (v / v.norm())[0].float()
    by_hand = torch.eye(8)[0] + unit[0] * (h / h.norm())[0, 0].detach()
    assert h.grad is not None
    assert torch.allclose(h.grad[0, 0], by_hand, atol=1e-6)


@pytest.mark.parametrize("norm", [14_000.0, 60_000.0])
def test_T11_huge_norms_keep_their_direction_in_low_precision(norm):
    v = torch.randn(1, 256)
    v = v / v.norm() * norm
    out = overwrite(torch.zeros(1, 1, 256, dtype=torch.bfloat16), v, 0, 150.0)[0, 0].float()
    assert float(torch.cosine_similarity(out, v[0], dim=0)) > 0.9999
    assert float(out.norm()) == pytest.approx(150, rel=1e-2)


# What may be injected


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_T11_zero_nan_and_infinite_vectors_are_refused(bad):
    vectors = torch.randn(4, 8)
    vectors[2] = bad
    with pytest.raises(InbriefError, match=r"finite|zero"):
        check_vectors(vectors, 8)


def test_T11_one_bad_coordinate_is_enough_and_one_zero_coordinate_is_fine():
    vectors = torch.randn(4, 8)
    vectors[1, 3] = 0.0
    check_vectors(vectors, 8)
    vectors[1, 3] = float("nan")
    with pytest.raises(InbriefError, match="1 of 4"):
        check_vectors(vectors, 8)


@pytest.mark.parametrize("shape", [(8,), (2, 7), (1, 2, 8)])
def test_T11_wrong_shapes_are_refused(shape):
    with pytest.raises(InbriefError, match=r"\[n, 8\]"):
        check_vectors(torch.randn(shape), 8)


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_T11_a_vector_whose_norm_leaves_float32_is_refused(size):
    with pytest.raises(InbriefError, match="Activations must"):
        check_vectors(torch.full((1, 8), size), 8)


# The armed pass


@HOW
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_T7_the_injected_pass_equals_a_computation_by_hand(tiny_av, how, family):
    av = tiny_av(family, how.method)
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(4)) * 30
    ids = torch.tensor([[*av.prefix, *av.suffix]]).expand(3, -1)
    with torch.no_grad(), injected(av.model, av.contract.injection, vectors, len(av.prefix), av.contract.marker_id):
        found = av.model(input_ids=ids).logits[:, -1]
    with torch.no_grad():
        by_hand = torch.stack([logits_by_hand(av, v, [])[0] for v in vectors])
        without = av.model(input_ids=ids).logits[:, -1]
    assert torch.allclose(found, by_hand, atol=1e-5)
    assert (found - without).abs().max() > 1e-2


@HOW
def test_T6_row_i_receives_vector_i(model, how):
    ids, vectors = ids_with_marker(1).expand(4, -1), torch.randn(4, 32)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        with injected(model, how, vectors, 2, MARK):
            straight = model(input_ids=ids).logits
        with injected(model, how, vectors[order], 2, MARK):
            shuffled = model(input_ids=ids).logits
    assert torch.allclose(shuffled, straight[order], atol=1e-6)
    assert (straight[0] - straight[1]).abs().max() > 1e-3


@HOW
@pytest.mark.parametrize("ids", [torch.full((2, 6), 11), ids_with_marker(2, column=3)], ids=["absent", "elsewhere"])
def test_T1_T2_a_missing_marker_raises_before_any_block_runs(model, how, ids):
    ran = []
    model.model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(InbriefError, match="marker"), injected(model, how, torch.randn(2, 32), 2, MARK):
        model(input_ids=ids)
    assert not ran


@HOW
def test_T2_one_row_without_marker_among_many_raises(model, how):
    ids = ids_with_marker(3)
    ids[1, 2] = 30
    with pytest.raises(InbriefError, match="some do not"), injected(model, how, torch.randn(3, 32), 2, MARK):
        model(input_ids=ids)


@HOW
def test_T2_an_armed_vector_that_no_pass_used_is_an_error(model, how):
    with pytest.raises(InbriefError, match="no forward pass"), injected(model, how, torch.randn(1, 32), 2, MARK):
        pass


@HOW
def test_T2_passing_embeddings_around_the_check_is_an_error(model, how):
    embeds = torch.randn(1, 6, 32)
    with pytest.raises(InbriefError, match="no forward pass"), injected(model, how, torch.randn(1, 32), 2, MARK):
        model(inputs_embeds=embeds)


@HOW
def test_T5_a_second_pass_under_one_armed_vector_is_an_error(model, how):
    ids = ids_with_marker(2)
    with pytest.raises(InbriefError, match="one forward pass"), injected(model, how, torch.randn(2, 32), 2, MARK):
        model(input_ids=ids)
        model(input_ids=ids)


@HOW
@pytest.mark.parametrize("rows", [1, 3])
def test_T6_numbers_of_rows_and_vectors_must_agree(model, how, rows):
    with pytest.raises(InbriefError, match="one vector"), injected(model, how, torch.randn(2, 32), 2, MARK):
        model(input_ids=ids_with_marker(rows))


def test_T8_overwriting_without_a_scale_is_refused(model):
    how = Injection(method="embed_overwrite", scale=None)
    with pytest.raises(InbriefError, match="scale"), injected(model, how, torch.randn(1, 32), 2, MARK):
        model(input_ids=ids_with_marker(1))


@HOW
def test_T5_nothing_stays_armed_after_use_or_after_an_error(model, how):
    ids = ids_with_marker(1)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with injected(model, how, torch.randn(1, 32), 2, MARK):
            model(input_ids=ids)
        with pytest.raises(InbriefError), injected(model, how, torch.randn(1, 32), 3, MARK):
            model(input_ids=ids)
        after = model(input_ids=ids).logits
    assert hooks(model) == 0
    assert torch.equal(before, after)


def test_T5_an_injection_layer_the_model_does_not_have_is_refused_and_leaves_nothing_armed(model):
    how = Injection(method="residual_add", layer=9)
    with pytest.raises((InbriefError, IndexError)), injected(model, how, torch.randn(1, 32), 2, MARK):
        model(input_ids=ids_with_marker(1))
    assert hooks(model) == 0


@HOW
def test_T4_the_gradient_of_an_injected_pass_survives_leaving_the_context(model, how):
    ids, vectors = ids_with_marker(2), torch.randn(2, 32)

    def gradient(inside: bool) -> torch.Tensor:
        model.zero_grad()
        with injected(model, how, vectors, 2, MARK):
            loss = model(input_ids=ids).logits.square().mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return model.model.layers[0].mlp.up_proj.weight.grad.clone()

    assert torch.equal(gradient(True), gradient(False))


@HOW
def test_a_masked_marker_embedding_gets_no_gradient_only_when_overwritten(model, how):
    ids = ids_with_marker(2)
    with injected(model, how, torch.randn(2, 32), 2, MARK):
        hidden = model.model(input_ids=ids).last_hidden_state
    hidden.square().sum().backward()
    grad = model.get_input_embeddings().weight.grad[MARK]
    assert bool(grad.abs().sum() > 0) == (how.method == "residual_add")
