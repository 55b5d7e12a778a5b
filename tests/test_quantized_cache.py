"""int8 caches for transformers models, on a small Llama with random weights."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

import amct_pytorch as amct  # noqa: E402
from amct_pytorch.errors import ModelError, RecordError  # noqa: E402
from amct_pytorch.formats import INT8  # noqa: E402
from amct_pytorch.kv_cache import (  # noqa: E402
    CalibratingCache,
    QuantizedCache,
    key_name,
    quantized_projections,
    value_name,
)
from amct_pytorch.record.kv_cache import read_kv_factors  # noqa: E402


def tiny(**changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **changes,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight[[1, -3]] *= 12  # outlier channels, one in each head
    return model


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 97, (4, 24), generator=torch.Generator().manual_seed(3))


def fill(path, model, tokens, granularity="per_channel", mask=None):
    op = amct.QuantCalibrationOp(path, {"batch_num": 2, "quant_granularity": granularity})
    with torch.inference_mode():
        for i, part in enumerate(tokens.split(2)):
            seen = None if mask is None else mask[2 * i : 2 * i + 2]
            cache = CalibratingCache(model.config, op, seen)
            given = model(part, attention_mask=seen, past_key_values=cache).logits
            assert torch.equal(given, model(part, attention_mask=seen).logits)
    return path


def sqnr(original, other):
    return float(10 * torch.log10(original.square().sum() / (original - other).square().sum()))


@torch.inference_mode()
def states(model, tokens):
    cache = transformers.DynamicCache()
    model(tokens, past_key_values=cache)
    return cache.layers


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_cache_holds_the_integers_that_the_factors_make(tmp_path, model, tokens, granularity):
    record = fill(tmp_path / "r", model, tokens, granularity)
    factors = read_kv_factors(record)
    assert set(factors) == {name(i) for i in range(2) for name in (key_name, value_name)}
    cache = QuantizedCache(model.config, record)
    with torch.inference_mode():
        logits = model(tokens, past_key_values=cache).logits
        assert sqnr(model(tokens).logits, logits) > 25
    # The first layer sees what it sees in the float network.
    original = states(model, tokens)[0].keys
    found = factors[key_name(0)]
    channels = original.transpose(1, 2).flatten(2)
    wanted = INT8.quantize(channels, torch.tensor(found.scale), torch.tensor(found.offset))
    assert cache.layers[0].keys.dtype == torch.int8
    assert torch.equal(cache.layers[0].keys.transpose(1, 2).flatten(2).float(), wanted)
    # One byte for four, and the factors.
    numbers = 2 * sum(x.keys.numel() for x in cache.layers)
    size = 16 if granularity == "per_channel" else 1
    assert cache.nbytes() == numbers + 2 * 2 * 2 * 4 * size


def test_token_by_token_is_the_same_as_all_at_once(tmp_path, model, tokens):
    record = fill(tmp_path / "r", model, tokens)
    whole, stepwise = (QuantizedCache(model.config, record) for _ in range(2))
    with torch.inference_mode():
        expected = model(tokens, past_key_values=whole).logits
        steps = [model(t, past_key_values=stepwise).logits for t in tokens.split(1, dim=1)]
    # A value at a rounding boundary may fall to either side when sums run in another order.
    assert sqnr(expected, torch.cat(steps, 1)) > 35
    assert stepwise.get_seq_length() == 24
    assert stepwise.layers[0].keys.shape == whole.layers[0].keys.shape


def test_generate_runs_with_beams_and_the_cache_can_be_cropped(tmp_path, model, tokens):
    record = fill(tmp_path / "r", model, tokens)
    given = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for beams in (1, 2):
        cache = QuantizedCache(model.config, record)
        out = model.generate(tokens, past_key_values=cache, num_beams=beams, **given)
        assert out.shape == (4, 29)
    cache = QuantizedCache(model.config, record)
    with torch.inference_mode():
        model(tokens, past_key_values=cache)
    cache.crop(-4)
    assert cache.get_seq_length() == 20


def test_padding_is_not_observed(tmp_path, model, tokens):
    mask = torch.ones_like(tokens)
    mask[:, :5] = 0
    with_mask = read_kv_factors(fill(tmp_path / "a", model, tokens, mask=mask))
    parts = zip(tokens.split(2), mask.split(2), strict=True)
    keys = [states_of(model, *part) for part in parts]
    seen = torch.cat([k[:, 5:].flatten(0, 1) for k in keys])
    scale = torch.tensor(with_mask[key_name(0)].scale)
    # No candidate range is wider than 1.3 times what was seen.
    assert bool(
        (scale * 255 <= 1.3 * (seen.amax(0).clamp(min=0) - seen.amin(0).clamp(max=0)) + 1e-6).all()
    )
    assert with_mask != read_kv_factors(fill(tmp_path / "b", model, tokens))


@torch.inference_mode()
def states_of(model, tokens, mask):
    cache = transformers.DynamicCache()
    model(tokens, attention_mask=mask, past_key_values=cache)
    return cache.layers[0].keys.transpose(1, 2).flatten(2)


def projections_record(folder, model, tokens):
    amct.create_quant_cali_config(
        folder / "kv.json", model, {"kv_cache_quant_layers": ["*.k_proj", "*.v_proj"]}
    )
    text = (folder / "kv.json").read_text().replace('granularity": 0', 'granularity": 1')
    (folder / "kv.json").write_text(text)
    calibrating = amct.create_quant_cali_model(folder / "kv.json", folder / "p", model)
    with torch.inference_mode():
        calibrating(tokens)
    return folder / "p"


def test_projections_before_rotation_are_simulated_and_hooks_come_off(tmp_path, model, tokens):
    record = projections_record(tmp_path, model, tokens)
    with torch.inference_mode():
        original = model(tokens).logits
        with quantized_projections(model, record):
            quantized = model(tokens).logits
        assert sqnr(original, quantized) > 25
        assert torch.equal(model(tokens).logits, original)


def test_records_of_the_other_kind_are_refused(tmp_path, model, tokens):
    with pytest.raises(RecordError, match=r"no KV-cache factors.*before rotation.*Calibrating"):
        QuantizedCache(model.config, projections_record(tmp_path, model, tokens))
    record = fill(tmp_path / "r", model, tokens)
    with (
        pytest.raises(RecordError, match=r"create_quant_cali_model; cache\.layers\.0\.keys is no"),
        quantized_projections(model, record),
    ):
        pass


def test_factors_of_another_model_are_refused(tmp_path, model, tokens):
    record = fill(tmp_path / "r", model, tokens)
    other = tiny(head_dim=4)
    with pytest.raises(RecordError, match="has 16 scales; allowed: 1 or 8"):
        other(tokens, past_key_values=QuantizedCache(other.config, record))


def test_sliding_windows_are_refused(tmp_path):
    config = transformers.MistralConfig(num_hidden_layers=2, sliding_window=8)
    with pytest.raises(ModelError, match="full_attention only"):
        QuantizedCache(config, tmp_path / "r")
