import torch

from amct_pytorch.observers.channel_range import ChannelRange
from amct_pytorch.observers.input_sample import InputSample


def test_takes_tokens_of_every_batch_and_the_first_of_each():
    sample = InputSample(batches=4, items=20)
    for number in range(4):
        sample.add(torch.arange(300.0).view(3, 50, 2) + 1000 * number)
    rows = sample.tokens(2)
    assert rows.shape == (20, 2)
    assert rows[::5].tolist() == [[1000.0 * n, 1000.0 * n + 1] for n in range(4)]
    # 150 tokens a batch, every 30th.
    assert rows[:5, 0].tolist() == [0, 60, 120, 180, 240]


def test_few_tokens_are_all_kept_and_own_their_memory():
    sample = InputSample(batches=1, items=8)
    x = torch.randn(3, 4, dtype=torch.float16)
    sample.add(x)
    sample.add(x[:0])
    assert torch.equal(sample.tokens(4), x.float())
    x.zero_()
    assert bool(sample.tokens(4).any())
    assert InputSample(2).tokens(4).shape == (0, 4)


def test_images_are_bounded_by_their_size():
    sample = InputSample(batches=2, dims=3, elements=4 * 3 * 8 * 8)
    images = [torch.randn(6, 3, 8, 8), torch.randn(6, 3, 8, 8), torch.randn(2, 3, 100, 100)]
    for batch in images:
        sample.add(batch)
    small, large = sample.items()
    assert torch.equal(small, torch.cat([images[0][[0, 3]], images[1][[0, 3]]]))
    assert torch.equal(large, images[2][:1])  # one of each batch, however large


def test_channel_range_over_batches():
    seen = ChannelRange(2)
    seen.add(torch.tensor([[[1.0, -2.0]], [[3.0, -1.0]]]))
    seen.add(torch.zeros(0, 2))
    seen.add(torch.tensor([[-5.0, -4.0]]))
    assert seen.lo.tolist() == [-5, -4]
    assert seen.hi.tolist() == [3, 0]
    assert seen.magnitude.tolist() == [5, 4]
