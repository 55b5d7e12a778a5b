"""Statistics shared by layers that are called with one tensor."""

import gc
import weakref

import torch

from amct_pytorch.algorithms.sharing import InputStatistics, note_counted, statistics_for


class Layer:
    """Counts what it is called with."""

    def __init__(self):
        self.statistics, self.batch = None, 0

    def new(self):
        found = InputStatistics(self)
        found.seen = []
        return found

    def __call__(self, x):
        self.statistics, known = statistics_for(x, self.batch, self, self.statistics, self.new)
        if not known:
            self.statistics.seen.append(float(x.sum()))
            note_counted(x, self.batch, self.statistics)
        self.batch += 1


def test_one_tensor_is_counted_once_by_layers_of_one_pass():
    a, b = Layer(), Layer()
    for x in (torch.ones(2), torch.ones(3)):
        a(x)
        b(x)
    assert a.statistics is b.statistics
    assert a.statistics.seen == [2, 3]


def test_the_same_tensor_in_the_next_batch_counts_again():
    """As where data are loaded into one buffer again and again."""
    a, b, x = Layer(), Layer(), torch.ones(2)
    for value in (1.0, 5.0):
        x.fill_(value)
        a(x)
        b(x)
    assert a.statistics.seen == b.statistics.seen == [2, 10]


def test_a_tensor_that_was_changed_is_another():
    a, b, x = Layer(), Layer(), torch.ones(2)
    a(x)
    x.mul_(3)
    b(x)
    assert a.statistics.seen == [2] and b.statistics.seen == [6]


def test_a_tensor_keeps_no_statistics_alive():
    a, x = Layer(), torch.ones(2)
    a(x)
    gone = weakref.ref(a.statistics)
    a.statistics = None
    gc.collect()
    assert gone() is None


def test_inference_tensors():
    a, b = Layer(), Layer()
    with torch.inference_mode():
        x = torch.ones(2)
        a(x)
        b(x)
    assert a.statistics is b.statistics
