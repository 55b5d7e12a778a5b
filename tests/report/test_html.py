"""The HTML report: its structure from ledgers of several flows, and in a real browser."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import pytest

from amct_pytorch.errors import ConfigError, PackageMissingError
from amct_pytorch.report.decomposition import DecompositionEntry, DecompositionLedger
from amct_pytorch.report.html import report_path, write_report
from amct_pytorch.report.html.layout import drawn
from amct_pytorch.report.html.write import RANKING_FILE, render
from amct_pytorch.report.ledger import InputHistogram, LayerEntry, Ledger, OutputEntry
from amct_pytorch.report.network import Network, NetworkNode

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NASTY = "<b>\"&'</b>"


def ledger() -> Ledger:
    def layer(name, sqnr, **more):
        return LayerEntry(
            name, "Conv2d", "quantized", parameters=90, input_scale=0.02, input_offset=-128,
            input_range=(0.0, 6.0), weight_bits=8, weight_scales=4, sqnr_db=sqnr, cosine=0.99,
            input_bits=8, input_histogram=InputHistogram(0.0, 6.0, [50, 30, 15, 5]), **more,
        )  # fmt: skip

    nodes = [("input", "input"), ("layer", "stem"), ("layer", NASTY), ("join", "add"),
             ("layer", "last"), ("layer", "head"), ("output", "output")]  # fmt: skip
    return Ledger(
        "quantize_model",
        [
            layer("stem", 40.0),
            layer(NASTY, 9.5, notes=["a & b"]),
            layer("last", 20.0),
            LayerEntry("head", "Linear", "float", "reused layer: it ran 2 times", 40),
        ],
        OutputEntry(21.5, 0.998, 0.96875),
        {"observe": 1.25},
        {"float": 4 << 20, "fake-quant": 4 << 20, "deploy": 1 << 20},
        network=Network(
            [NetworkNode(*node) for node in nodes],
            [(0, 1), (1, 2), (1, 3), (2, 3), (3, 4), (4, 5), (5, 6)],
        ),
    )


class Structure(HTMLParser):
    """What a page has: tags, ids, links, texts; complains of tags that are not closed."""

    VOID = frozenset({"meta", "link", "input", "br", "rect", "path"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]


def page(document, **more) -> tuple[str, Structure]:
    text = render(json.loads(json.dumps(document)), "net", **more)
    return text, Structure(text)


def test_the_page_is_one_file_that_loads_nothing():
    text, found = page(dataclasses.asdict(ledger()))
    for tag, attrs in found.tags:
        for name in ("src", "href", "srcset", "poster", "data"):
            value = attrs.get(name)
            assert value is None or value.startswith(("#", "data:,")), (tag, value)
    assert not re.search(r"https?://|@import|url\(", text)
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for attrs in found.all("a"):
        assert attrs["href"][1:] in ids


def test_it_can_be_used_without_a_mouse_and_says_what_things_are():
    _, found = page(dataclasses.asdict(ledger()))
    assert found.all("html")[0]["lang"] == "en"
    assert [a["href"] for a in found.all("a")[:2]] == ["#summary", "#layers"]
    rows = [attrs for attrs in found.all("tr") if attrs.get("id", "").startswith("layer-")]
    assert len(rows) == 4
    assert all(attrs["tabindex"] == "0" for attrs in rows)
    for attrs in found.all("svg"):
        assert attrs["aria-label"]
    regions = [attrs for _, attrs in found.tags if attrs.get("role") == "region"]
    assert regions
    assert all(attrs["aria-label"] and attrs["tabindex"] == "0" for attrs in regions)


def test_every_layer_is_in_table_and_drawing_with_its_error_and_nothing_is_markup():
    text, found = page(dataclasses.asdict(ledger()))
    assert NASTY not in text
    nodes = {a["aria-label"]: a["class"] for a in found.all("a") if "node" in a.get("class", "")}
    assert nodes == {
        "stem: 40.0 dB": "node g0",
        f"{NASTY}: 9.5 dB": "node g4",
        "last: 20.0 dB": "node g2",
        "head: float (reused layer: it ran 2 times)": "node gleft",
    }
    assert "reused layer: it ran 2 times" in text
    assert "a &amp; b" in text


def test_the_ranking_is_by_what_a_layer_adds():
    text, _ = page(dataclasses.asdict(ledger()))
    ranking = text[text.index('class="ranking"') : text.index("</ol>")]
    # 40 -> 9.5 dB; "last" reads both, and is better than the worse of them.
    assert re.findall(r'class="figure">([\d.]+) dB', ranking) == ["30.5"]


def test_values_outside_the_chosen_range_are_counted():
    text, _ = page(dataclasses.asdict(ledger()))
    # Integers reach 255 * 0.02 = 5.1 of 6: the last bin, 4.5 to 6, keeps 40 % of its 5 values.
    assert "chosen 0 to 5.1; 3.00% clipped" in text


def test_sizes_accuracy_and_latency_before_and_after():
    comparison = {
        "samples": 12,
        "outputs": [{"name": "logits", "sqnr_db": 23.0, "exact": False, "cosine": 0.997,
                     "top1_agreement": 0.5}],
        "models": {
            "float": {"milliseconds": 10.0, "kind": "float"},
            "quant": {"milliseconds": 5.0, "kind": "QDQ", "runs_in": "ONNX Runtime"},
        },
        "speed_up": 2.0,
    }  # fmt: skip
    text, _ = page(dataclasses.asdict(ledger()), comparison=comparison)
    for shown in ("1.00 MiB", "float 4.00 MiB, 25% of it", "5.0 ms", "2.00 times as fast"):
        assert shown in text
    assert "23.0 dB" in text
    assert "same best class 50.0%" in text
    with pytest.raises(ConfigError, match="comparison"):
        page(dataclasses.asdict(ledger()), comparison={"outputs": [{"name": "x"}]})


def test_a_ledger_of_decomposition_fits():
    entries = [
        DecompositionEntry("a", "decomposed", None, (3, 3), (1, 1), 900, 300, 1800, 600, "FCFK",
                           10, 12, error=0.3, milliseconds_before=2.0, milliseconds_after=1.0),
        DecompositionEntry("b", "kept", "its kernel is 1x1", (1, 1), (1, 1), 90, 90, 180, 180),
    ]  # fmt: skip
    found = DecompositionLedger(entries, {"policy": "evbmf"}, "one sample of input_data")
    found.add_up()
    text, _ = page(json.loads(found.to_json()))
    for shown in ("1 of 2", "390", "before 990, 39% of it", "its kernel is 1x1", "relative error"):
        assert shown in text


def test_a_ledger_of_a_flow_that_nobody_knew_fits():
    document = {
        "flow": "some_new_flow",
        "layers": [
            {"name": "a", "status": "pruned", "channels": [64, 16], "new_figure": 1.5},
            {"name": "b", "status": "whole", "reason": "too narrow", "channels": [8, 8]},
        ],
        "groups": [{"producers": ["a"], "total": 64, "kept": 16}],
        "parameters": [1000, 250],
        "unfollowed": ["foo"],
    }
    text, _ = page(document)
    for shown in (
        "64 → 16",
        "new figure",
        "too narrow",
        "before 1,000, 25% of it",
        "groups",
        "foo",
    ):
        assert shown in text


def test_an_old_ledger_is_read(tmp_path):
    old = dataclasses.asdict(ledger())
    del old["network"]
    for layer in old["layers"]:
        for key in ("input_bits", "input_histogram", "weight_shape", "output_shape", "macs"):
            del layer[key]
    (tmp_path / "net_ledger.json").write_text(json.dumps(old))
    assert Ledger.from_json(json.dumps(old)).network is None
    write_report(tmp_path / "net_ledger.json", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert 'id="network"' not in text
    assert "40.0" in text


def test_the_ranking_of_a_search_beside_the_ledger_is_shown(tmp_path):
    (tmp_path / "net_ledger.json").write_text(ledger().to_json())
    (tmp_path / RANKING_FILE).write_text(json.dumps([["last", 0.71], ["stem", 0.99]]))
    write_report(tmp_path / "net_ledger.json", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert re.findall(r'class="figure">([\d.]+)<', text) == ["0.710000", "0.990000"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "no JSON object"),
        ('{"layers": 3}', "no list 'layers'"),
        ('{"layers": [{"type": "x"}]}', r"layers\[0\] has no name"),
        ('{"layers": [], "network": {"nodes": [], "edges": [[0, 1]]}}', "edges"),
    ],
)
def test_what_is_no_ledger_is_refused_and_nothing_is_written(tmp_path, text, message):
    (tmp_path / "l.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        write_report(tmp_path / "l.json", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_without_jinja2_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PackageMissingError, match=r"pip install 'amct-pytorch\[report\]'"):
        write_report(tmp_path / "l.json", tmp_path / "r.html")


def test_the_report_goes_beside_the_ledger(tmp_path):
    assert report_path(tmp_path / "net_ledger.json") == tmp_path / "net_report.html"
    assert report_path(tmp_path / "ledger.json") == tmp_path / "report.html"


def test_no_two_nodes_of_a_drawing_overlap_and_edges_go_down():
    edges = [(0, 1), (0, 2), (0, 3), (1, 4), (2, 4), (3, 5), (4, 5), (0, 5), (2, 6), (5, 6)]
    found = drawn(7, edges)
    for i, (x, rank) in enumerate(found.places):
        for other, (x2, rank2) in enumerate(found.places):
            if i != other and rank == rank2:
                assert abs(x - x2) >= 1 - 1e-9
    for path in found.paths:
        assert [rank for _, rank in path] == list(range(path[0][1], path[-1][1] + 1))
    assert all(0.5 - 1e-9 <= x <= found.width for x, _ in found.places)


# --- in a browser --------------------------------------------------------------------------------

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: chromium)")

SCRIPT = """
<script>
window.addEventListener("load", function () {
  var out = {errors: window.problems || []};
  var names = function () {
    return Array.from(document.querySelectorAll("#table tbody tr:not([hidden]) th"))
      .map(function (cell) { return cell.textContent; });
  };
  out.before = names();
  var heads = Array.from(document.querySelectorAll("#table thead button"));
  var sqnr = heads.find(function (b) { return b.textContent.startsWith("SQNR dB"); });
  sqnr.click(); out.up = names(); out.sorted = sqnr.parentNode.getAttribute("aria-sort");
  sqnr.click(); out.down = names();
  var filter = document.getElementById("filter");
  filter.value = "linear"; filter.dispatchEvent(new Event("input"));
  out.filtered = names(); out.told = document.getElementById("count").textContent;
  location.hash = "#layer-0"; window.dispatchEvent(new HashChangeEvent("hashchange"));
  out.focused = document.activeElement.id; out.unfiltered = names().length;
  var row = document.activeElement;
  row.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown", bubbles: true}));
  out.next = document.activeElement === row.nextElementSibling;
  var colour = function () { return getComputedStyle(document.body).backgroundColor; };
  var first = colour(); document.getElementById("theme").click();
  out.toggled = first !== colour();
  out.overflow = document.documentElement.scrollWidth - window.innerWidth;
  out.width = window.innerWidth;
  var box = document.createElement("pre");
  box.id = "result"; box.textContent = JSON.stringify(out); document.body.appendChild(box);
});
</script>
"""
CATCH = "<script>window.problems = []; window.onerror = m => { window.problems.push(m); };</script>"


def chromium(*words: str) -> str:
    base = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    done = subprocess.run([*base, *words], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


@in_browser
def test_it_sorts_filters_moves_by_keyboard_and_fits_a_phone(tmp_path):
    text, _ = page(dataclasses.asdict(ledger()))
    # A frame is as narrow as a phone whatever a window's least width is.
    inner = text.replace("<head>", f"<head>{CATCH}").replace("</body>", f"{SCRIPT}</body>")
    (tmp_path / "r.html").write_text(inner)
    for width in (375, 1280):
        (tmp_path / "f.html").write_text(
            f'<iframe src="r.html" width="{width}" height="800" style="border:0"></iframe>'
            "<script>window.onload = function () { setTimeout(function () {"
            "document.body.textContent = document.querySelector('iframe').contentDocument"
            ".getElementById('result').textContent; }, 300); };</script>"
        )
        dump = chromium(
            "--allow-file-access-from-files", "--virtual-time-budget=3000", "--dump-dom",
            f"file://{tmp_path}/f.html",
        )  # fmt: skip
        found = json.loads(unescape(re.search(r"<body>(\{.*\})</body>", dump, re.DOTALL)[1]))
        assert found["errors"] == []
        assert found["width"] == width
        assert found["overflow"] <= 0
        assert found["before"][0] == "stem"
        # The layer without a figure stays at the end both ways.
        assert found["up"] == [NASTY, "last", "stem", "head"]
        assert found["down"] == ["stem", "last", NASTY, "head"]
        assert found["sorted"] == "ascending"
        assert found["filtered"] == ["head"]
        assert found["told"] == "1 of 4 layers"
        assert (found["focused"], found["unfiltered"], found["next"]) == ("layer-0", 4, True)
        assert found["toggled"] is True


@in_browser
def test_it_is_drawn_in_light_and_in_dark(tmp_path):
    from PIL import Image

    text, _ = page(dataclasses.asdict(ledger()))
    (tmp_path / "r.html").write_text(text)
    brightness = {}
    for mode, more in (("light", []), ("dark", ["--blink-settings=preferredColorScheme=0"])):
        file = tmp_path / f"{mode}.png"
        chromium(
            *more, f"--screenshot={file}", "--window-size=1280,1600", f"file://{tmp_path}/r.html"
        )
        with Image.open(file) as shot:
            assert shot.size == (1280, 1600)
            brightness[mode] = shot.convert("L").resize((1, 1)).getpixel((0, 0))
            # Something is drawn: the grades' colours among many others.
            assert len(shot.convert("RGB").getcolors(1 << 24)) > 200
    assert brightness["light"] > 200
    assert brightness["dark"] < 60
