"""A real 3-D U-Net that finds the brain in a head MRI, and a scan with its mask to judge it by.

The network ships inside the package deepbrain (MIT) as a frozen TensorFlow graph, of which only
the constants are read. The scan is Debian's mricron-data (BSD-3-Clause): `ch2`, one head scanned
27 times and averaged (Holmes et al. 1998), and `ch2bet`, the same with the brain alone left.
Unpack it without installing:

    apt-get download mricron-data && dpkg-deb -x mricron-data_*.deb outputs/mricron
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from real_models import MissingAsset, package_folder
from torch import Tensor, nn

# Where Debian's package puts its scans, under the root or under where it was unpacked.
SCANS = Path("usr") / "share" / "mricron" / "templates"
UNPACKED = Path("outputs") / "mricron"
SIZE = 128
# Channels in and out of the 3 x 3 x 3 convolutions, down and up again.
CHANNELS = ((1, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32), (64, 32), (32, 16), (16, 8))
UP_CHANNELS = ((32, 32), (32, 16), (16, 8))


class BrainNet(nn.Module):
    """Scans [N, 1, D, H, W] in 0 to 1 to logits [N, 1, D, H, W]; sizes divisible by 8."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv3d(i, o, 3, padding=1) for i, o in CHANNELS)
        self.ups = nn.ModuleList(nn.ConvTranspose3d(i, o, 3, 2, bias=False) for i, o in UP_CHANNELS)
        self.last = nn.Conv3d(CHANNELS[-1][1], 1, 1)
        self.pool = nn.MaxPool3d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of each voxel being brain."""
        skips: list[Tensor] = []
        for first, second in zip(self.convs[:6:2], self.convs[1:6:2], strict=True):
            x = first(x).relu()
            skips.append(second(x).relu())
            x = self.pool(skips[-1])
        for up, conv in zip(self.ups, self.convs[6:], strict=True):
            # TensorFlow's "same" drops the last of the 2 n + 1 places.
            x = up(x)[..., :-1, :-1, :-1]
            x = conv(torch.cat([x, skips.pop()], 1)).relu()
        logits: Tensor = self.last(x)
        return logits


class Scan(NamedTuple):
    """A head in 0 to 1 and where its brain is, both [1, 1, 128, 128, 128]."""

    head: Tensor
    brain: Tensor


def brain_net() -> BrainNet:
    """The network with its weights (171 thousand), in eval mode."""
    file = package_folder("deepbrain") / "models" / "graph.pb"
    if not file.exists():
        raise MissingAsset("deepbrain is installed without models/graph.pb")
    constants = dict(_constants(file.read_bytes()))
    model = BrainNet()
    named = [("conv3d", [*model.convs, model.last]), ("conv3d_transpose", list(model.ups))]
    with torch.no_grad():
        for prefix, layers in named:
            for number, layer in enumerate(layers):
                scope = f"{prefix}_{number}" if number else prefix
                # TensorFlow: [depth, height, width, in, out], for transposed ones [..., out, in].
                kernel = constants[f"{scope}/kernel"]
                layer.weight.copy_(torch.from_numpy(kernel.transpose(4, 3, 0, 1, 2).copy()))
                if layer.bias is not None:
                    layer.bias.copy_(torch.from_numpy(constants[f"{scope}/bias"].copy()))
    return model.eval()


def scan() -> Scan:
    """The averaged head and its brain, resampled to 128 voxels a side."""
    folder = _scans()
    head, brain = _nifti(folder / "ch2.nii.gz"), _nifti(folder / "ch2bet.nii.gz")
    head = _resampled(head)
    return Scan(head / head.max(), _resampled((brain > 0).float()) > 0.5)


def calibration_scans(number: int = 4, seed: int = 0) -> Iterator[Tensor]:
    """Other heads [1, 1, 128, 128, 128] made of the one: shifted, mirrored, darker, noisier.

    There is one scan only; the one that is judged is never calibrated on as it is.
    """
    head = scan().head
    generator = torch.Generator().manual_seed(seed)
    for i in range(number):
        shifts = torch.randint(-8, 9, (3,), generator=generator).tolist()
        changed = head.roll(shifts, (2, 3, 4))
        if i % 2:
            changed = changed.flip(2)
        gain = 0.85 + 0.15 * float(torch.rand(1, generator=generator))
        noise = 0.01 * torch.randn(head.shape, generator=generator)
        yield (gain * changed + noise).clamp(0, 1)


def dice(logits: Tensor, brain: Tensor) -> float:
    """Overlap of the voxels found with the voxels that are brain: 2 |A and B| / (|A| + |B|)."""
    found = logits > 0
    return float(2 * (found & brain).sum() / (found.sum() + brain.sum()))


def _scans() -> Path:
    given = os.environ.get("MRICRON_DIR")
    folders = [Path(given)] if given else [UNPACKED / SCANS, Path("/") / SCANS]
    for folder in folders:
        if (folder / "ch2.nii.gz").exists():
            return folder
    raise MissingAsset(
        f"no ch2.nii.gz in {' or '.join(map(str, folders))}; unpack Debian's mricron-data there: "
        "apt-get download mricron-data && dpkg-deb -x mricron-data_*.deb outputs/mricron"
    )


def _resampled(volume: Tensor) -> Tensor:
    return nn.functional.interpolate(
        volume[None, None], (SIZE,) * 3, mode="trilinear", align_corners=False
    )


def _nifti(file: Path) -> Tensor:
    """A NIfTI-1 volume, float32 [x, y, z]: header of 348 bytes, then values, x fastest."""
    content = gzip.decompress(file.read_bytes())
    sizes = np.frombuffer(content, "<i2", 8, offset=40)[1:4]
    code = int(np.frombuffer(content, "<i2", 1, offset=70)[0])
    start = int(np.frombuffer(content, "<f4", 1, offset=108)[0])
    dtype = {2: "u1", 4: "<i2", 16: "<f4"}[code]
    values = np.frombuffer(content, dtype, int(np.prod(sizes)), offset=start)
    return torch.from_numpy(values.reshape(sizes[::-1]).T.astype(np.float32))


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Number and value of each field of a protobuf message, as they stand on the wire."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(message):
        key = varint()
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            yield number, varint()
        else:
            length = {1: 8, 5: 4}.get(wire_type) or varint()
            yield number, message[place : place + length]
            place += length


def _one(message: bytes, number: int) -> bytes:
    """The last field of that number; empty if there is none."""
    found = b""
    for field, value in _fields(message):
        if field == number and isinstance(value, bytes):
            found = value
    return found


def _constants(graph: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """Name and value of each float32 constant of a GraphDef.

    Fields of TensorFlow's messages: GraphDef.node 1; NodeDef.name 1, .op 2, .attr 5 (a map: key 1,
    value 2); AttrValue.tensor 8; TensorProto.dtype 1, .tensor_shape 2, .tensor_content 4,
    .float_val 5; TensorShapeProto.dim 2, whose size is 1.
    """
    for field, node in _fields(graph):
        if field != 1 or not isinstance(node, bytes) or _one(node, 2) != b"Const":
            continue
        for number, attribute in _fields(node):
            if number != 5 or not isinstance(attribute, bytes) or _one(attribute, 1) != b"value":
                continue
            tensor = _one(_one(attribute, 2), 8)
            dtype = dict(_fields(tensor)).get(1)
            shape = [dict(_fields(d)).get(1, 0) for n, d in _fields(_one(tensor, 2)) if n == 2]
            content = _one(tensor, 4) or _one(tensor, 5)
            if dtype == 1 and content:
                yield _one(node, 1).decode(), np.frombuffer(content, "<f4").reshape(shape)
