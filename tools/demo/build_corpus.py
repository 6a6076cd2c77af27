"""Build the demo's corpus and tokenizer from installed Debian packages.

Order: read pages, drop near-copies, give each page to a split, train the tokenizer on the
train split, cut pages into documents, drop near-copies among documents, write Parquet.

    apt-get install postgresql-doc-15 python3.11-doc dict-wn bible-kjv perl-doc apache2-doc \
        sqlite3-doc python-django-doc python-sqlalchemy-doc sphinx-doc python-werkzeug-doc \
        python-flask-doc python-jinja2-doc dict-gcide
    python tools/demo/build_corpus.py --train-dir build --text-dir src/var_moe/demo/text
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from manuals import manual_pages
from sources import Page, kjv_pages, postgres_pages, python_pages, wordnet_pages
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from webster import webster_pages

SPLITS = ("calibration", "validation", "certify", "test")
SOURCES = ("postgres", "python", "wordnet")
SPECIAL = "<|endoftext|>"
# Tokens wanted per bundled split, with a margin for what the last filters drop.
TARGET_TOKENS = {
    "calibration": 1_580_000,
    "validation": 450_000,
    "certify": 450_000,
    "test": 450_000,
}
TARGET_SHARE = {"postgres": 0.24, "python": 0.36, "wordnet": 0.40}
CHARS_PER_TOKEN = {"postgres": 3.9, "python": 3.5, "wordnet": 3.3}
# A page above this share of its source's characters goes to train, and one above the smaller
# share to train or calibration: so that the other splits hold many pages, not a few long ones.
GIANT_SHARE, LONG_SHARE = 0.01, 0.003
KJV_SHARE = 0.5  # of the chapters, drawn at random
KJV_SPLIT = {"calibration": 0.2, "validation": 0.2, "certify": 0.3, "test": 0.3}

MIN_TOKENS, HARD_MAX = 100, 500  # of a bundled document, the special token included
SHINGLE = 8
NEAR_COPY = 0.5
OVERLAP = 0.2  # of a further text's document with anything kept
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Where a document ends, in tokens: at a heading from `heading` on, else before `full`.

    Blocks longer than `block` are cut at line or sentence ends.
    """

    heading: int
    full: int
    block: int


TRAIN_SIZES = Sizes(heading=200, full=450, block=340)
BUNDLED_SIZES = Sizes(heading=180, full=360, block=260)


@dataclass(frozen=True, kw_only=True)
class Document:
    """A bundled row: a section of a page, or a page of dictionary entries."""

    id: str
    source: str
    page: str
    split: str
    text: str
    tokens: int


class NearCopies:
    """Hashed 8-word shingles of everything kept so far."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._words: dict[str, int] = {}

    def shingles(self, text: str) -> np.ndarray:
        """Unique 64-bit hashes of the text's word 8-grams, lower case, digits as one sign."""
        words = re.findall(r"[a-z]+|\d+|[^\w\s]", text.lower())
        table = self._words
        ids = [table.setdefault("0" if w.isdigit() else w, len(table) + 1) for w in words]
        array = np.asarray(ids, dtype=np.uint64)
        width = min(SHINGLE, max(len(array), 1))
        out = np.zeros(max(len(array) - width + 1, 0), dtype=np.uint64)
        for offset in range(width):
            out = (out ^ array[offset : offset + len(out)]) * _MULTIPLIER
            out ^= out >> np.uint64(29)
        return np.unique(out)

    def share(self, shingles: np.ndarray) -> float:
        """The share of these shingles that something kept has."""
        if not len(shingles):
            return 1.0
        return sum(x in self._seen for x in shingles.tolist()) / len(shingles)

    def add(self, shingles: Iterable[np.ndarray]) -> None:
        """Remember these shingles."""
        for array in shingles:
            self._seen.update(array.tolist())


def drop_near_copies(pages: Sequence[Page], min_chars: int = 500) -> list[Page]:
    """Without pages of under 500 characters (tables of contents) and near-copies."""
    seen, kept = NearCopies(), []
    for page in pages:
        text = page.text
        shingles = seen.shingles(text)
        if len(text) < min_chars or seen.share(shingles) > NEAR_COPY:
            continue
        seen.add([shingles])
        kept.append(page)
    return kept


def assign(pages: Sequence[Page], source: str, seed: int) -> dict[str, str]:
    """The split of each page by name: random, giants to train, until each target is full."""
    order = np.random.default_rng([seed, SOURCES.index(source)]).permutation(len(pages))
    total = sum(len(page.text) for page in pages)
    need = {
        split: tokens * TARGET_SHARE[source] * CHARS_PER_TOKEN[source]
        for split, tokens in TARGET_TOKENS.items()
    }
    wanted = dict(need)
    out = {}
    for index in order:
        page = pages[index]
        size = len(page.text)
        # The split that is relatively emptiest takes the page, if it still wants any.
        open_to = ["calibration"] if size > LONG_SHARE * total else list(need)
        split = max(open_to, key=lambda name: need[name] / wanted[name])
        if size > GIANT_SHARE * total or need[split] < 0:
            split = "train"
        else:
            need[split] -= size
        out[page.name] = split
    return out


def assign_kjv(pages: Sequence[Page], seed: int) -> dict[str, str]:
    """A random part of the chapters over the four bundled splits; the rest is left out."""
    order = np.random.default_rng([seed, 9]).permutation(len(pages))
    order = order[: int(len(pages) * KJV_SHARE)]
    edges = np.cumsum([0, *KJV_SPLIT.values()]) * len(order)
    out = {}
    for split, low, high in zip(KJV_SPLIT, edges[:-1], edges[1:], strict=True):
        for index in order[round(low) : round(high)]:
            out[pages[index].name] = split
    return out


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE; `tokenizer(text)` puts one `<|endoftext|>` before the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL} $A", pair=f"{SPECIAL} $A {SPECIAL} $B", special_tokens=[(SPECIAL, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL,
        eos_token=SPECIAL,
        pad_token=SPECIAL,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def _lengths(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[int]:
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [len(item) for item in encoded]


def _split_block(
    text: str, tokenizer: PreTrainedTokenizerFast, limit: int
) -> list[tuple[str, int]]:
    """A block of at most `limit` tokens as it is, a longer one cut at line or sentence ends."""
    length = _lengths(tokenizer, [text])[0]
    if length <= limit:
        return [(text, length)]
    glue = "\n" if "\n" in text else " "
    parts = text.split("\n") if glue == "\n" else re.split(r"(?<=[.;:]) ", text)
    if len(parts) == 1:
        words = text.split(" ")
        parts = [" ".join(words[i : i + 60]) for i in range(0, len(words), 60)]
    out: list[tuple[str, int]] = []
    current: list[str] = []
    size = 0
    for part, count in zip(parts, _lengths(tokenizer, parts), strict=True):
        if size and size + count + 1 > limit:
            out.append((glue.join(current), size))
            current, size = [], 0
        current.append(part)
        size += count + 1
    out.append((glue.join(current), size))
    return out


def cut(page: Page, split: str, tokenizer: PreTrainedTokenizerFast) -> list[Document]:
    """The page's documents: consecutive blocks, a new one at headings or when full."""
    sizes = TRAIN_SIZES if split == "train" else BUNDLED_SIZES
    if page.source == "wordnet":
        texts = [page.text]
    else:
        texts, current, size = [], [], 0
        for block in page.blocks:
            for text, count in _split_block(block.text, tokenizer, sizes.block):
                full = size + count + 1 > sizes.full and size >= MIN_TOKENS
                if full or (block.heading and size >= sizes.heading):
                    texts.append(page.separator.join(current))
                    current, size = [], 0
                current.append(text)
                size += count + 1
        if current:
            texts.append(page.separator.join(current))
        if len(texts) > 1 and size < MIN_TOKENS:
            joined = page.separator.join(texts[-2:])
            if _lengths(tokenizer, [joined])[0] <= HARD_MAX - 1:
                texts[-2:] = [joined]
    documents = []
    for number, (text, count) in enumerate(zip(texts, _lengths(tokenizer, texts), strict=True)):
        if split != "train" and not MIN_TOKENS <= count + 1 <= HARD_MAX:
            continue
        identity = f"{page.source}/{page.name}#{number}"
        documents.append(
            Document(
                id=identity,
                source=page.source,
                page=page.name,
                split=split,
                text=text,
                tokens=count + 1,
            )
        )
    return documents


def unique(documents: Sequence[Document]) -> list[Document]:
    """Without repeated texts, and without documents whose shingles are mostly seen before.

    Mostly = more than half stand in earlier other pages.

    Earlier = in the order train, calibration, validation, certify, test.
    """
    groups: dict[tuple[str, str, str], list[Document]] = defaultdict(list)
    for name in ("train", *SPLITS):
        for document in documents:
            if document.split == name:
                groups[name, document.source, document.page].append(document)
    seen, kept, texts = NearCopies(), [], set()
    for group in groups.values():
        shingles = [seen.shingles(document.text) for document in group]
        good = [seen.share(array) <= NEAR_COPY for array in shingles]
        for document, keep in zip(group, good, strict=True):
            if keep and document.text not in texts:
                texts.add(document.text)
                kept.append(document)
        seen.add(shingles)
    return kept


def further(
    pages: Sequence[Page], kept: Sequence[Document], tokenizer: PreTrainedTokenizerFast
) -> list[Document]:
    """Further texts' documents, for training alone: nothing that stands in a bundled document."""
    seen, texts = NearCopies(), {document.text for document in kept}
    seen.add(seen.shingles(document.text) for document in kept)
    found = []
    for page in pages:
        shingles = []
        for document in cut(page, "train", tokenizer):
            array = seen.shingles(document.text)
            if seen.share(array) <= OVERLAP and document.text not in texts:
                texts.add(document.text)
                found.append(document)
                shingles.append(array)
        seen.add(shingles)
    return found


def statistics(documents: Sequence[Document]) -> pd.DataFrame:
    """Documents and tokens per split and source, with each source's share of tokens."""
    frame = pd.DataFrame([vars(document) for document in documents])
    table = frame.groupby(["split", "source"]).agg(
        pages=("page", "nunique"), documents=("id", "count"), tokens=("tokens", "sum")
    )
    for column in ("documents", "tokens"):
        total = table[column].groupby("split").transform("sum")
        table[f"{column}_share"] = (table[column] / total).round(3)
    return table


def check(documents: Sequence[Document]) -> None:
    """Raise ValueError where the corpus breaks a promise of tools/README.md."""
    table = statistics([d for d in documents if d.source in SOURCES])
    by_page = defaultdict(set)
    for document in documents:
        by_page[document.source, document.page].add(document.split)
    if any(len(splits) > 1 for splits in by_page.values()):
        raise ValueError("a page stands in two splits")
    if len({document.text for document in documents}) < len(documents):
        raise ValueError("a text stands twice")
    for split in SPLITS:
        if table.loc[split, "tokens_share"].min() < 0.2:
            raise ValueError(f"{split}: a source has less than a fifth of the tokens")
        if split != "calibration" and table.loc[split, "documents"].sum() < 1_200:
            raise ValueError(f"{split}: fewer than 1,200 documents")
    if table.loc["calibration", "tokens"].sum() < 1_500_000:
        raise ValueError("calibration: fewer than 1.5M tokens")


def write(documents: Sequence[Document], train_dir: Path, text_dir: Path) -> None:
    """train.parquet, the four bundled splits, and kjv.parquet with its column `split`."""
    frame = pd.DataFrame([vars(document) for document in documents])
    text_dir.mkdir(parents=True, exist_ok=True)
    options = {"index": False, "compression": "zstd", "compression_level": 19}
    columns = ["id", "source", "text"]
    mix = frame[frame.source != "kjv"]
    mix[mix.split == "train"][columns].to_parquet(train_dir / "train.parquet", **options)
    for split in SPLITS:
        rows = mix[mix.split == split].sample(frac=1.0, random_state=0)
        rows[columns].to_parquet(text_dir / f"{split}.parquet", **options)
    kjv = frame[frame.source == "kjv"][["id", "source", "split", "text"]]
    kjv.to_parquet(text_dir / "kjv.parquet", **options)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--train-dir", type=Path, required=True, help="train split, tokenizer")
    parser.add_argument("--text-dir", type=Path, required=True, help="the bundled splits")
    parser.add_argument("--vocabulary", type=int, default=4_096)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.train_dir.mkdir(parents=True, exist_ok=True)

    texts = {
        "postgres": list(postgres_pages()),
        "python": list(python_pages()),
        "wordnet": list(wordnet_pages(seed=options.seed)),
    }
    pages: list[tuple[Page, str]] = []
    for source, found in texts.items():
        kept = drop_near_copies(found)
        split_of = assign(kept, source, options.seed)
        print(f"{source}: {len(found)} pages, {len(kept)} kept", flush=True)
        pages += [(page, split_of[page.name]) for page in kept]

    tokenizer = train_tokenizer(
        (page.text for page, split in pages if split == "train"), options.vocabulary
    )
    tokenizer.save_pretrained(options.train_dir / "tokenizer")

    kjv = list(kjv_pages())
    split_of = assign_kjv(kjv, options.seed)
    pages += [(page, split_of[page.name]) for page in kjv if page.name in split_of]
    documents = [doc for page, split in pages for doc in cut(page, split, tokenizer)]
    kept_documents = unique(documents)
    print(f"{len(documents)} documents, {len(kept_documents)} kept", flush=True)
    for pages_found in (manual_pages(), webster_pages(seed=options.seed)):
        kept_documents += further(drop_near_copies(pages_found), kept_documents, tokenizer)
    table = statistics(kept_documents)
    print(table.to_string(), flush=True)
    table.reset_index().to_csv(options.train_dir / "corpus.csv", index=False)
    write(kept_documents, options.train_dir, options.text_dir)
    check(kept_documents)


if __name__ == "__main__":
    main()
