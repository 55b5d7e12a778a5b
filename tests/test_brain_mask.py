"""The readers of the 3-D network's files, on small files made here."""

from __future__ import annotations

import gzip

import brain_mask
import numpy as np
import torch


def field(number: int, value: bytes | int) -> bytes:
    """A protobuf field of fewer than 128 bytes, or a small integer."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    return bytes([number << 3 | 2, len(value)]) + value


def constant(name: bytes, values: np.ndarray, op: bytes = b"Const") -> bytes:
    shape = b"".join(field(2, field(1, size)) for size in values.shape)
    tensor = field(1, 1) + field(2, shape) + field(4, values.tobytes())
    attribute = field(1, b"value") + field(2, field(8, tensor))
    kind = field(1, b"dtype") + field(2, field(6, 1))
    return field(1, field(1, name) + field(2, op) + field(5, kind) + field(5, attribute))


def test_constants_of_a_graph_have_their_names_shapes_and_values():
    first, second = np.arange(6, dtype="<f4").reshape(1, 2, 3), np.array([0.5], "<f4")
    graph = constant(b"a/kernel", first) + constant(b"x", first, op=b"Add")
    graph += constant(b"a/bias", second)
    found = dict(brain_mask._constants(graph))
    assert list(found) == ["a/kernel", "a/bias"]
    np.testing.assert_array_equal(found["a/kernel"], first)
    np.testing.assert_array_equal(found["a/bias"], second)


def test_a_varint_of_several_bytes_is_read():
    # 300 = 0b10_0101100: the low seven bits come first.
    assert list(brain_mask._fields(bytes([1 << 3, 0xAC, 0x02]))) == [(1, 300)]


def test_a_nifti_volume_is_read_with_x_fastest(tmp_path):
    header = bytearray(352)
    header[40:56] = np.array([3, 2, 3, 4, 1, 1, 1, 1], "<i2").tobytes()
    header[70:72] = np.array([4], "<i2").tobytes()
    header[108:112] = np.array([352], "<f4").tobytes()
    values = np.arange(24, dtype="<i2")
    file = tmp_path / "scan.nii.gz"
    file.write_bytes(gzip.compress(bytes(header) + values.tobytes()))
    volume = brain_mask._nifti(file)
    assert volume.shape == (2, 3, 4)
    assert volume[1, 0, 0] == 1 and volume[0, 1, 0] == 2 and volume[0, 0, 1] == 6


def test_dice_is_one_where_masks_agree_and_counts_overlap_twice():
    brain = torch.tensor([True, True, False, False])
    assert brain_mask.dice(torch.tensor([1.0, 1.0, -1.0, -1.0]), brain) == 1
    assert brain_mask.dice(torch.tensor([1.0, -1.0, 1.0, -1.0]), brain) == 0.5


def test_the_network_keeps_its_input_size():
    model = brain_mask.BrainNet().eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 1, 16, 8, 24)).shape == (1, 1, 16, 8, 24)
