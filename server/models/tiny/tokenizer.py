"""The bundled model's tokenizer: whole words, and single bytes for everything else.

Text of users is normalised (NFKC, lower case, punctuation to blanks), so case and punctuation change nothing. A known
word is one token with its leading blank (``▁star``); codes, times and unknown words are a blank and one token a byte.
Answers keep case and punctuation (:func:`encode_answer`): capital letters, ``,`` and ``.`` are byte tokens as well.

``python -m server.models.tiny.tokenizer`` writes tokenizer.json and tokenizer_config.json beside this file.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from server.models.tiny import grammar, language
from server.models.tiny.world import COLORS, PLATE_COLORS, SHAPES

PAD, BOS, USER, ASSISTANT, END, VST = SPECIALS = ("<pad>", "<s>", "<user>", "<assistant>", "<end>", "<vst>")
PREFIX = "<s>You are a helpful video assistant.<user>"
"""What precedes the video: the prefix ("sink") of every sequence."""
VOCAB_SIZE = 1024
BLANK = "▁"
FOLDER = Path(__file__).parent

# What follows the video: system texts, the last three questions with their answers, the question. The first turn's
# <user> belongs to the prefix. The model has learnt dialogues of that length.
CHAT_TEMPLATE = (
    "{%- set answers = namespace(at=[]) -%}"
    "{%- for message in messages[:-1] -%}"
    "{%- if message['role'] == 'assistant' -%}{%- set answers.at = answers.at + [loop.index0] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set before = answers.at[-4] if answers.at | length > 3 else -1 -%}"
    "{%- for message in messages -%}"
    "{%- if loop.index0 > before or message['role'] == 'system' -%}"
    "{%- if message['content'] is string -%}{%- set text = message['content'] -%}"
    "{%- else -%}{%- set text = message['content'] | selectattr('type', 'equalto', 'text')"
    " | map(attribute='text') | join(' ') -%}{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{{- '<assistant>' + text + '<end><user>' -}}"
    "{%- else -%}{{- text + ' ' -}}{%- endif -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}"
)


def vocabulary() -> dict[str, int]:
    """Token -> id: specials, 256 bytes, the blank, words of answers, questions and noise, up to VOCAB_SIZE."""
    answers = " ".join([*language.ANSWERS.values(), language.NO_VIDEO, "Yes No"])
    rules = [line for lines in grammar.RULES.values() for line in lines]
    templates = [line for group in grammar.TEMPLATES.values() for lines in group for line in lines]
    questions = " ".join(
        [
            *rules, *templates, *grammar.PREFIXES, *grammar.SUFFIXES, *COLORS, *SHAPES, *PLATE_COLORS,
            *language.POSITIONS, *language.POSITIONS.values(), "a an yes no",
            PREFIX.replace("<s>", "").replace(USER, ""),
            *(line for lines in language.PLAIN.values() for line in lines),
        ]
    )  # fmt: skip
    names = re.compile(r"\{\w+\}|\$\w+|\b[A-Z]+[12]?\b(?<!\bI)")
    cased = re.findall(r"[A-Za-z]+", names.sub(" ", answers))
    lowered = re.findall(r"[a-z]+", names.sub(" ", questions).lower())
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), BLANK]
    words = dict.fromkeys([*cased, *(word.lower() for word in cased), *sorted(set(lowered))])
    tokens += [BLANK + word for word in words]
    if len(tokens) > VOCAB_SIZE:
        raise ValueError(f"the grammar needs {len(tokens)} tokens, more than {VOCAB_SIZE}")
    fillers = (BLANK + word for word in grammar.FILLERS.split())
    tokens = list(dict.fromkeys([*tokens, *fillers]))[:VOCAB_SIZE]
    return {token: index for index, token in enumerate(tokens)}


def build() -> Tokenizer:
    """The tokenizer from the grammar's words."""
    # With no merges and ignore_merges, a piece is one token if it is in the vocabulary and bytes otherwise.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary(), merges=[], byte_fallback=True, ignore_merges=True))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"(?<!\d):|:(?!\d)|(?<!\d)-|-(?!\d)"), " "),
            normalizers.Replace(Regex(r"[\p{P}\p{S}&&[^:\-▁<>+=%$#@&*/]]"), " "),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = _pieces()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


def _pieces() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(BLANK, prepend_scheme="always"), pre_tokenizers.Punctuation("isolated")]
    )


@cache
def load() -> Tokenizer:
    """The committed tokenizer, for users' text (shared: do not change it)."""
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@cache
def _cased() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Sequence([])
    return tokenizer


def encode_answer(text: str) -> list[int]:
    """Ids of an answer as the model generates it: case and punctuation kept, no leading blank before a code or time."""
    ids: list[int] = _cased().encode(text, add_special_tokens=False).ids
    return ids[1:] if ids[:1] == [_cased().token_to_id(BLANK)] else ids


def save(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into ``folder``."""
    build().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    save(FOLDER)
