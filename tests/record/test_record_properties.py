"""Records survive their file bit for bit, and broken files are the user's to mend."""

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from amct_pytorch.errors import AmctError
from amct_pytorch.record.factors import LayerFactors
from amct_pytorch.record.record_file import RecordFile, read_record, write_record

few = settings(max_examples=150, deadline=None)
scales = st.floats(2.0**-149, 2.0**127, width=32)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@st.composite
def factors(draw):
    bits = draw(st.sampled_from([4, 8]))
    scale_d = draw(st.none() | scales)
    offset = draw(st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    return LayerFactors(
        scale_w=tuple(draw(st.lists(scales, max_size=5))),
        scale_d=scale_d,
        offset_d=0 if scale_d is None else offset,
        weight_bits=draw(st.sampled_from([4, 6, 7, 8])),
        activation_bits=bits,
        balance=tuple(draw(st.lists(scales, max_size=3))),
        skip_fusion=draw(st.booleans()),
        fakequant_precision_mode=draw(st.sampled_from(["DEFAULT", "FORCE_FP16_QUANT"])),
    )


layers = st.dictionaries(names, factors(), max_size=4)


@few
@given(first=layers, second=layers)
def test_a_record_survives_its_file_and_changes(first, second):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "record.txt")
        write_record(path, RecordFile(first))
        record = read_record(path)
        assert list(record.factors.items()) == list(first.items())
        record.factors.update(second)
        write_record(path, record, announce=False)
        assert list(read_record(path).factors.items()) == list((first | second).items())


GOOD = """\
record {
  key: "layer1.0.conv1"
  value { scale_d: 0.0039 offset_d: -128 scale_w: 0.001 offset_w: 0 wts_type: "INT8" }
  kv_cache_value { scale: 0.5 offset: 0 }
}
prune_record { producer { name: "a" attr { name: "type" type: STRING s: "Conv" i: 3 } } }
"""
SPLICES = st.sampled_from(
    [*"{}[]\":;,<>\\\n\0#'", "-", "nan", "1e99", "0x", "\\377", "INT9", "é", "\ufeff"]
) | st.text(max_size=3)


@st.composite
def mutations(draw):
    text = GOOD
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        stop = min(len(text), start + draw(st.integers(0, 30)))
        middle = draw(st.just("") | st.just(text[start:stop] * 2) | SPLICES)
        text = text[:start] + middle + text[stop:]
    return text


def read_and_write_again(text: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "record.txt")
        path.write_text(text, encoding="utf-8")
        try:
            record = read_record(path)
        except AmctError as error:
            assert str(path) in str(error)
            return False
        write_record(path, record, announce=False)
        assert read_record(path).factors == record.factors
        return True


def test_the_text_to_mutate_is_good():
    assert read_and_write_again(GOOD)


@few
@given(text=mutations())
def test_mutated_records_give_user_errors_only(text):
    read_and_write_again(text)
