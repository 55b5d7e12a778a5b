"""Protobuf text as it is printed: the same message comes back."""

import numpy as np
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from amct_pytorch.proto import ScaleOffsetRecord
from amct_pytorch.proto.text import print_text

floats = st.floats(width=32, allow_nan=False)
texts = st.text(st.characters(exclude_categories=["Cs"]))


def read(text):
    return text_format.Parse(text, ScaleOffsetRecord())


@given(
    st.lists(st.tuples(texts, st.lists(floats), st.integers(-(2**31), 2**31 - 1), st.booleans()))
)
def test_any_record_reads_back_equal(entries):
    message = ScaleOffsetRecord()
    for key, scales, offset, skip in entries:
        value = message.record.add(key=key).value
        value.scale_w.extend(scales)
        value.scale_d = scales[0] if scales else 1.0
        value.offset_d = offset
        value.skip_fusion = skip
        value.shift_bit.extend([0, 2**32 - 1])
    assert read(print_text(message)) == message


def test_every_field_and_scales_as_protobuf_itself_writes_them():
    message = ScaleOffsetRecord()
    entry = message.record.add(key='layer.0 "é"\n\\')
    scales = np.random.default_rng(0).uniform(1e-6, 1e3, 2000).astype(np.float32)
    entry.value.scale_w.extend(scales.tolist())
    entry.value.scale_d = 1e-30
    entry.value.wts_type = "INT8"
    entry.kv_cache_value.scale.extend([0.5, 1.0])
    entry.kv_cache_value.offset.extend([-3, 0])
    pruned = message.prune_record.add()
    attribute = pruned.producer.add(name="conv").attr.add(name="type", s=b"Conv\x00")
    attribute.type = attribute.DESCRIPTOR.fields_by_name["type"].enum_type.values[1].number
    attribute.ints.extend([3, -17])
    text = print_text(message)
    assert read(text) == message
    assert text == text_format.MessageToString(message, as_utf8=True)
