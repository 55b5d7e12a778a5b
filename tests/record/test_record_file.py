"""Reading, changing and writing the record file."""

import dataclasses
import re

import pytest
import torch
from google.protobuf import text_format

from amct_pytorch.errors import FileMissingError, RecordError
from amct_pytorch.proto import ScaleOffsetRecord
from amct_pytorch.record.factors import LayerFactors
from amct_pytorch.record.record_file import RecordFile, read_record, write_record

EXAMPLE = """\
record {
  key: "layer1.0.conv1"
  value {
    scale_d: 0.00392156886
    offset_d: -128
    scale_w: 0.00106807391
    scale_w: 0.00104224426
    offset_w: 0
    offset_w: 0
    act_type: "INT8"
    wts_type: "INT8"
  }
}
"""
OTHERS = """\
record {
  key: "kv"
  kv_cache_value {
    scale: 0.5
    offset: 3
  }
}
prune_record {
  producer { name: "layer1.0.conv1" attr { name: "type" type: STRING s: "Conv" }
             attr { name: "prune_index" type: INTS ints: 3 ints: 17 } }
  consumer { name: "bn" }
}
prune_record { selective_prune { name: "conv1" attr { name: "mask_shape" type: INTS ints: 32 } } }
"""


def f32(value: float) -> float:
    return float(torch.tensor(value))


def read(tmp_path, text: str) -> RecordFile:
    path = tmp_path / "record.txt"
    path.write_text(text, encoding="utf-8")
    return read_record(path)


def written(tmp_path, record: RecordFile) -> str:
    write_record(tmp_path / "out.txt", record, announce=False)
    return (tmp_path / "out.txt").read_text(encoding="utf-8")


def parsed(text: str) -> ScaleOffsetRecord:
    return text_format.Parse(text, ScaleOffsetRecord())


def test_the_example_of_the_format(tmp_path):
    assert read(tmp_path, EXAMPLE).factors == {
        "layer1.0.conv1": LayerFactors(
            scale_w=(f32(0.00106807391), f32(0.00104224426)),
            scale_d=f32(0.00392156886),
            offset_d=-128,
        )
    }


def test_what_a_new_record_looks_like(tmp_path):
    scales = torch.tensor([0.1, 1e-7, 3.0], dtype=torch.float32)
    factors = {
        "层": LayerFactors(scale_w=tuple(scales.tolist()), scale_d=f32(0.7), offset_d=-5),
        "fc": LayerFactors(
            scale_w=(2.0,),
            weight_bits=4,
            balance=(0.5, 1.5),
            skip_fusion=True,
            fakequant_precision_mode="FORCE_FP16_QUANT",
        ),
    }
    assert written(tmp_path, RecordFile(factors)) == (
        'record {\n  key: "层"\n  value {\n    scale_d: 0.7\n    offset_d: -5\n'
        "    scale_w: 0.1\n    scale_w: 1e-07\n    scale_w: 3.0\n"
        "    offset_w: 0\n    offset_w: 0\n    offset_w: 0\n"
        '    act_type: "INT8"\n    wts_type: "INT8"\n  }\n}\n'
        'record {\n  key: "fc"\n  value {\n    scale_w: 2.0\n    offset_w: 0\n'
        "    tensor_balance_factor: 0.5\n    tensor_balance_factor: 1.5\n    skip_fusion: true\n"
        '    act_type: "INT8"\n    wts_type: "INT4"\n'
        '    fakequant_precision_mode: "FORCE_FP16_QUANT"\n  }\n}\n'
    )


def test_an_empty_record(tmp_path):
    assert written(tmp_path, RecordFile()) == ""
    assert read(tmp_path, "").factors == {}


def test_any_order_comments_and_later_values(tmp_path):
    record = read(
        tmp_path,
        """# written by hand
        record { value { scale_w: [0.5, 0.25] act_type: 'INT8' offset_w: [0, 0] offset_d: 1
                         offset_d: 2, scale_d: 0.1; scale_d: 0.5f } key: 'a' }""",
    )
    assert record.factors == {"a": LayerFactors(scale_w=(0.5, 0.25), scale_d=0.5, offset_d=2)}


@pytest.mark.parametrize(
    ("types", "weight_bits", "activation_bits"),
    [
        ("", 8, 8),
        ('wts_type: "INT6" act_type: "INT8"', 6, 8),
        ('wts_type: "INT4" act_type: "INT4"', 4, 4),
        ('dst_type: "INT8"', 8, 8),
        ('dst_type: "INT4"', 4, 4),
        ('dst_type: "INT7"', 7, 8),
        ('dst_type: "INT4" wts_type: "INT8"', 8, 4),
    ],
)
def test_all_three_type_fields_are_read(tmp_path, types, weight_bits, activation_bits):
    text = f'record {{ key: "a" value {{ scale_w: 1 offset_w: 0 {types} }} }}'
    factors = read(tmp_path, text).factors["a"]
    assert (factors.weight_bits, factors.activation_bits) == (weight_bits, activation_bits)


def test_incomplete_layers_are_legal(tmp_path):
    record = read(
        tmp_path,
        'record { key: "a" value { scale_w: 1 offset_w: 0 } } record { key: "b" value {} }',
    )
    assert [factors.complete for factors in record.factors.values()] == [False, False]
    assert list(record.factors) == ["a", "b"]


def test_what_others_wrote_survives_a_change(tmp_path):
    record = read(tmp_path, OTHERS + EXAMPLE)
    assert list(record.factors) == ["layer1.0.conv1"]
    old = record.factors["layer1.0.conv1"]
    record.factors["layer1.0.conv1"] = dataclasses.replace(old, scale_d=0.5)
    record.factors["fc"] = LayerFactors(scale_w=(1.0,), scale_d=0.25)
    after = parsed(written(tmp_path, record))
    assert [entry.key for entry in after.record] == ["layer1.0.conv1", "fc", "kv"]
    assert after.record[0].value.scale_d == 0.5
    before = parsed(OTHERS)
    assert after.record[2] == before.record[0]
    assert list(after.prune_record) == list(before.prune_record)


def test_fields_of_other_layer_types_survive_a_change(tmp_path):
    other = "shift_bit: 3 scale_h: 0.5 offset_h: 1 scale_r: 2 offset_r: 0"
    entry = """record {{ key: "a" value {{ scale_w: 1 offset_w: 0 {} {} }}
               kv_cache_value {{ scale: 2 offset: 0 }} }}"""
    record = read(tmp_path, entry.format(other, 'dst_type: "INT4"'))
    record.factors["a"] = dataclasses.replace(record.factors["a"], scale_d=0.5, offset_d=-8)
    changed = 'scale_d: 0.5 offset_d: -8 act_type: "INT4" wts_type: "INT4"'
    assert parsed(written(tmp_path, record)) == parsed(entry.format(other, changed))


def test_an_unchanged_layer_keeps_its_entry_as_it_was(tmp_path):
    text = 'record { key: "a" value { scale_w: 1 offset_w: 0 dst_type: "INT8" shift_bit: 1 } }'
    assert parsed(written(tmp_path, read(tmp_path, text))) == parsed(text)


def test_a_layer_taken_out_keeps_only_what_others_wrote(tmp_path):
    record = read(
        tmp_path,
        """record { key: "a" value { scale_w: 1 offset_w: 0 } kv_cache_value { scale: 2 } }
           record { key: "b" value { scale_w: 1 offset_w: 0 } }""",
    )
    record.factors.clear()
    expected = 'record { key: "a" kv_cache_value { scale: 2 } }'
    assert parsed(written(tmp_path, record)) == parsed(expected)


def test_reading_does_not_tie_two_records_together(tmp_path):
    record = read(tmp_path, EXAMPLE)
    record.factors.clear()
    assert written(tmp_path, record) == ""
    assert read(tmp_path, EXAMPLE).factors


def test_keys_are_held_against_the_model(tmp_path):
    record = read(tmp_path, EXAMPLE + OTHERS)
    record.check_keys(["layer1.0.conv1", "fc"])
    with pytest.raises(RecordError) as caught:
        record.check_keys(["layer1.0.conv2", "fc"])
    assert str(tmp_path / "record.txt") in str(caught.value)
    assert "layer1.0.conv1: the model has no such layer (did you mean 'layer1.0.conv2'?)" in str(
        caught.value
    )


def test_overwriting_is_announced_unless_it_is_the_flows_own_record(tmp_path, caplog):
    path = tmp_path / "sub" / "record.txt"
    write_record(path, RecordFile())
    write_record(path, RecordFile(), announce=False)
    assert not caplog.records
    write_record(path, RecordFile())
    assert str(path) in caplog.text


VALUES = [
    ("scale_w: 0 offset_w: 0", r"a: scale_w[0] is 0.0; allowed: finite and > 0"),
    ("scale_w: 1 scale_w: -1 offset_w: 0 offset_w: 0", "a: scale_w[1] is -1.0"),
    ("scale_w: nan offset_w: 0", "scale_w[0] is nan"),
    ("scale_d: inf", "a: scale_d is inf; allowed: finite and > 0"),
    ("scale_d: 1e-60", "a: scale_d is 0.0"),
    ("scale_d: 1 offset_d: 128", "a: offset_d is 128; allowed: -128 to 127"),
    ('scale_d: 1 offset_d: -9 act_type: "INT4"', "a: offset_d is -9; allowed: -8 to 7"),
    ("scale_w: 1", "a: offset_w has 0 values and scale_w 1; allowed: equally many"),
    ("scale_w: 1 offset_w: 0 offset_w: 0", "offset_w has 2 values and scale_w 1"),
    ("scale_w: 1 offset_w: 1", "a: offset_w[0] is 1; allowed: 0"),
    ("tensor_balance_factor: 1 tensor_balance_factor: 0", "tensor_balance_factor[1] is 0.0"),
    ('wts_type: "INT5"', 'a: wts_type is "INT5"; allowed: INT8, INT7, INT6, INT4'),
    ('act_type: "INT6"', 'a: act_type is "INT6"; allowed: INT8, INT4'),
    ('dst_type: "int8"', 'a: dst_type is "int8"; allowed: INT8'),
    ('fakequant_precision_mode: "X"', 'fakequant_precision_mode is "X"; allowed: DEFAULT or FORCE'),
]


@pytest.mark.parametrize(("fields", "words"), VALUES)
def test_values_out_of_range(tmp_path, fields, words):
    with pytest.raises(RecordError) as caught:
        read(tmp_path, f'record {{ key: "a" value {{ {fields} }} }}')
    assert str(caught.value).startswith(str(tmp_path / "record.txt"))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("record {\n  key: 'a'\n  value { scale_x: 1 }\n}", "line 3, column 11"),
        ("record {\n  key: 'a'\n  value { scale_x: 1 }\n}", "did you mean 'scale_w'?"),
        ("record { key: 3 }", "line 1, column 15"),
        ("record { key: 'a'", 'Expected "}"'),
        ("record { value { scale_d: 1 } }", "record[0].key is missing"),
        ("record { key: 'a' } record { key: 'a' }", 'record[1].key is "a", which an earlier'),
        (
            "prune_record { producer { } }",
            "required, but missing: prune_record[0].producer[0].name",
        ),
        ("record { key: '\\377' }", "utf-8"),
        ('\n {"batch_num": 1}', "is JSON, not a record of factors"),
        ("[[]]", "is JSON, not a record of factors"),
    ],
)
def test_text_that_is_no_record(tmp_path, text, words):
    with pytest.raises(RecordError) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "record.txt"))
    assert words in str(caught.value)


def test_all_problems_are_told_at_once(tmp_path):
    text = "".join(f'record {{ key: "{name}" value {{ scale_d: -1 }} }}' for name in "abc")
    with pytest.raises(RecordError, match=re.compile("3 problems.*a: .*b: .*c: ", re.DOTALL)):
        read(tmp_path, text)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileMissingError, match="record_file"):
        read_record(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        (LayerFactors(scale_d=float("nan")), "a: scale_d is nan"),
        (LayerFactors(scale_w=(1.0, 1e-50)), "a: scale_w[1] is 1e-50; allowed: finite and > 0, w"),
        (LayerFactors(scale_w=(1e39,)), "within float32"),
        (LayerFactors(scale_d=1.0, offset_d=200), "a: offset_d is 200"),
        (LayerFactors(weight_bits=5), "a: weight_bits is 5"),
        (LayerFactors(activation_bits=16), "a: activation_bits is 16"),
    ],
)
def test_factors_that_a_record_cannot_hold_are_not_written(tmp_path, factors, words):
    (tmp_path / "record.txt").write_text("old")
    with pytest.raises(RecordError) as caught:
        write_record(tmp_path / "record.txt", RecordFile({"a": factors}))
    assert words in str(caught.value)
    assert (tmp_path / "record.txt").read_text() == "old"
