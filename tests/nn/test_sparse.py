"""Layers with 2:4 sparse weights, as modules."""

import copy
import pickle

import pytest
import torch
from torch import nn

from amct_pytorch.algorithms.two_of_four import two_of_four_mask
from amct_pytorch.graph.layers import LAYER_KINDS
from amct_pytorch.nn.sparse import make_sparse, masked, sparse_layers


def sparse(module, kind, update_freq=0):
    layout = LAYER_KINDS[kind].layout(getattr(module, "groups", 1))
    mask = two_of_four_mask(module.weight.detach(), layout)
    make_sparse(module, LAYER_KINDS[kind], mask, update_freq)
    return module


def layers():
    torch.manual_seed(0)
    return {
        "Linear": (nn.Linear(8, 4), torch.randn(3, 8)),
        "Conv2d": (nn.Conv2d(8, 4, 3, groups=2, padding_mode="reflect", padding=1), image()),
        "ConvTranspose2d": (nn.ConvTranspose2d(8, 4, 2, 2, groups=2), image()),
    }


def image():
    return torch.randn(2, 8, 6, 6)


@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "ConvTranspose2d"])
def test_the_call_sees_zeros_and_gradients_go_to_all_weights(kind):
    module, x = layers()[kind]
    reference = copy.deepcopy(module)
    sparse(module, kind)
    with torch.no_grad():
        reference.weight.mul_(module.sparse_mask)
    expected = reference(x)
    expected.sum().backward()
    result = module(x)
    result.sum().backward()
    assert torch.equal(result, expected)
    # Straight through: the gradient that the sparse weight got, dense.
    assert torch.equal(module.weight.grad, reference.weight.grad)
    assert (module.weight.grad[~module.sparse_mask] != 0).any()
    assert (module.weight[~module.sparse_mask] != 0).any()


def selections(update_freq, batches):
    """In which batches another mask was selected, the weights being turned before each."""
    module = sparse(nn.Linear(4, 1, bias=False), "Linear", update_freq).train()
    changed = []
    for batch in range(batches):
        with torch.no_grad():
            module.weight.copy_(torch.roll(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 2 * batch + 1, 1))
        before = module.sparse_mask.clone()
        module(torch.randn(2, 4))
        if not torch.equal(before, module.sparse_mask):
            changed.append(batch)
    return changed


def test_masks_are_selected_anew_every_update_freq_batches():
    assert selections(update_freq=1, batches=4)[1:] == [1, 2, 3]
    assert [batch for batch in selections(update_freq=3, batches=8) if batch] == [3, 6]


def test_without_a_frequency_only_the_first_batch_selects():
    assert set(selections(update_freq=0, batches=5)) <= {0}
    module = sparse(nn.Linear(4, 1, bias=False), "Linear").train()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[4.0, 1.0, 3.0, 2.0]]))
    module(torch.randn(2, 4))
    assert module.sparse_mask.tolist() == [[True, False, True, False]]


def test_evaluation_neither_counts_nor_selects():
    module = sparse(nn.Linear(4, 2), "Linear", update_freq=1).eval()
    before = module.sparse_mask.clone()
    with torch.no_grad():
        module.weight.copy_(torch.roll(module.weight, 1, 1))
        module(torch.randn(2, 4))
    assert module.sparse_batches == 0
    assert torch.equal(before, module.sparse_mask)


def test_a_state_dict_has_masks_and_counters():
    module = sparse(nn.Linear(8, 2), "Linear", update_freq=2).train()
    for _ in range(3):
        module(torch.randn(2, 8))
    state = copy.deepcopy(module.state_dict())
    assert set(state) == {"weight", "bias", "sparse_mask", "sparse_batches"}
    other = sparse(nn.Linear(8, 2), "Linear", update_freq=2)
    other.load_state_dict(state)
    assert other.sparse_batches == 3
    assert torch.equal(other.sparse_mask, module.sparse_mask)
    del state["sparse_batches"]
    with pytest.raises(RuntimeError, match="sparse_batches"):
        other.load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_are_sparse_too(copied):
    network = nn.Sequential(sparse(nn.Conv2d(8, 4, 3), "Conv2d", 2), nn.ReLU()).train()
    x = image()
    network(x)
    twin = copied(network)
    assert list(sparse_layers(twin)) == ["0"]
    assert isinstance(twin[0], nn.Conv2d)
    assert torch.equal(twin(x), network(x))
    assert twin[0].sparse_batches == network[0].sparse_batches == 2
    with torch.no_grad():
        twin[0].weight.zero_()
    assert network[0].weight.any()


def test_a_transformer_layer_does_not_read_past_the_mask():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    sparse(layer.linear1, "Linear")
    reference = copy.deepcopy(layer)
    with torch.no_grad():
        found = layer(x)
        reference.linear1.weight.mul_(reference.linear1.sparse_mask)
        expected = reference(x)
    assert torch.equal(found, expected)


def test_masked_is_exact_where_weights_are_huge_or_denormal():
    weight = torch.tensor([1e38, -1e-44, 3e38, 1.0], requires_grad=True)
    mask = torch.tensor([True, True, False, False])
    result = masked(weight, mask)
    assert torch.equal(result, torch.tensor([1e38, -1e-44, 0.0, 0.0]))
