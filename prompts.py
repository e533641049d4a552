r"""
Prompts: from a question, or messages, to the token ids that a response continues.

    qwen_math, r1, none     templates of this file, see TEMPLATES
    chat                    the tokenizer's own template, which takes messages of several turns
    a file                  with one {question} in it, taken as it is
    a text                  with one {question} in it; \n and \t mean newline and tab

White space: a question is stripped at both ends. Messages go to the chat template as they are, and
it strips them (Llama's does) or does not (Qwen's). Nothing else is stripped, at the end of a
template neither.
"""

import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import jinja2

ROLES = ("system", "user", "assistant")
SLOT = "\ue000"  # of Unicode's private use: no template has it
SLOT_PATTERN = f"{SLOT}(\\d+){SLOT}"

TEMPLATES = {
    "qwen_math": (
        "<|im_start|>system\n"
        "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    # DeepSeek-R1 (2501.12948, table 1) as Dr. GRPO (2503.20783) uses it: the response begins inside
    # the think tag.
    "r1": (
        "A conversation between User and Assistant. The User asks a question, and the Assistant "
        "solves it. The Assistant first thinks about the reasoning process in the mind and then "
        "provides the User with the answer. The reasoning process is enclosed within <think> "
        "</think> and answer is enclosed within <answer> </answer> tags, respectively, i.e., "
        "<think> reasoning process here </think> <answer> answer here </answer>.\n"
        "User: {question}\nAssistant: <think>"
    ),
    "none": "{question}",
}


class Unusable(ValueError):
    """Why a row is not used. `data.load` collects these."""


def template_text(template: str) -> str:
    r"""
    The text with its {question} slot behind a template's name or file, or the text itself.

    Text is typed in a shell, so \n and \t in it mean newline and tab, and \\ a backslash; any other
    backslash stays what it is (\boxed). A file is taken as it is.
    """
    if template in TEMPLATES:
        return TEMPLATES[template]
    text = template
    if "{question}" in template:
        escapes = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
        text = re.sub(r"\\[nt\\]", lambda escape: escapes[escape[0]], template)
    elif os.path.isfile(template):
        try:
            text = Path(template).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"template {template}: not a text in UTF-8: {error}") from None
    if text.count("{question}") != 1:
        known = ", ".join([*TEMPLATES, "chat"])
        raise ValueError(
            f"template '{one_line(template)}': wanted {known}, "
            "or a file or a format string with one {question} in it"
        )
    return text


def one_line(template: str) -> str:
    r"""
    A template for headers: line ends and tabs as \n and \t, which --template takes for the same.
    """
    characters = [c if c.isprintable() else c.encode("unicode_escape").decode() for c in template]
    return "".join(characters)


def writer(tokenizer, template: str) -> Callable[[list[dict]], str]:
    """
    A function from messages to the text of their prompt, special tokens spelled out.

    Under "chat" the tokenizer's own template writes the messages; the others have one slot, so they
    take one turn. Raises ValueError for a template that is unknown or not for this tokenizer.
    """
    if template == "chat":
        if not tokenizer.chat_template:
            complaint = "this tokenizer has no chat template, wanted another template"
            raise ValueError(f"template chat: {complaint}")

        def write(messages):
            try:
                return tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            except jinja2.TemplateError as error:
                raise Unusable(f"the chat template refuses it: {error}") from None

        return write

    text = template_text(template)
    unknown = set(re.findall(r"<\|\w+\|>", text)) - special_tokens(tokenizer).keys()
    if unknown:
        raise ValueError(
            f"template '{one_line(template)}': {' '.join(sorted(unknown))} "
            "not among the special tokens of this tokenizer"
        )

    def write(messages):
        if len(messages) > 1:
            raise Unusable("messages of several turns, which need the template chat")
        return text.replace("{question}", messages[0]["content"].strip())

    return write


def opens_thought(tokenizer, template: str) -> bool:
    """
    Whether the template ends inside a thought: behind the question a <think> without </think>.

    The response then begins in the thought, and without a </think> it has no answer.
    """
    try:
        text = writer(tokenizer, template)([{"role": "user", "content": SLOT}])
    except Unusable:
        return False
    _, _, behind = text.rpartition(SLOT)
    _, _, behind = behind.rpartition("</think>")
    return "<think>" in behind


def special_tokens(tokenizer) -> dict[str, int]:
    added = tokenizer.added_tokens_decoder.items()
    return {str(token): i for i, token in added if token.special}


def messages_of(question) -> list[dict]:
    """The turns of a question or of messages, role and content alone. Raises Unusable."""
    if isinstance(question, str):
        question = [{"role": "user", "content": question.strip()}]
    if not isinstance(question, list) or not all(is_turn(turn) for turn in question):
        raise Unusable("problem is neither text nor messages of text")
    roles = [turn.get("role") for turn in question]
    if roles[-1:] != ["user"] or not all(role in ROLES for role in roles):
        known = ", ".join(ROLES)
        raise Unusable(f"messages that do not end with the user's, or with roles beyond {known}")
    if not question[-1]["content"].strip():
        raise Unusable("no problem")
    return [{"role": turn["role"], "content": turn["content"]} for turn in question]


def is_turn(turn) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("content"), str)


def tokenise(tokenizer, text: str, split_special: bool = False) -> list[int]:
    """The ids of a text. Raises Unusable for characters that leave no trace in them."""
    encoding = tokenizer(
        text, add_special_tokens=False, split_special_tokens=split_special,
        return_offsets_mapping=True, verbose=False,
    )
    covered = set()
    for start, end in encoding.offset_mapping:
        covered.update(range(start, end))
    for i, character in enumerate(text):
        # White space, controls and accents are a normaliser's business.
        if i not in covered and unicodedata.category(character)[0] not in "CMZ":
            raise Unusable("characters that the tokenizer does not know")
    return encoding.input_ids


def encoder(tokenizer, template: str) -> Callable[[str | list[dict]], tuple[int, ...]]:
    r"""
    A function from a question, or messages [{"role": ..., "content": ...}], to the ids of a prompt.

    They are what the tokenizer makes of the whole text, but special tokens come from the template
    alone. Where the data spell one, it is hidden from the template, the text is cut at the special
    tokens that are left, and what lies between two of them is plain text, in one call:

        {"role": "user", "content": "is <|im_end|> a word"}
        <|im_start|>user\nis SLOT a word<|im_end|>\n
        <|im_start|> | user\nis <|im_end|> a word | <|im_end|> | \n

    Raises ValueError for a template that is unknown or not for this tokenizer. The function raises
    Unusable.
    """
    write = writer(tokenizer, template)
    special = special_tokens(tokenizer)
    longest_first = sorted(special, key=len, reverse=True)
    spelling = "|".join(map(re.escape, longest_first)) or "(?!)"
    forged = re.compile(f"{spelling}|{SLOT}")
    border = re.compile(f"({spelling})")
    # Llama begins every text with a token of its own.
    bos = [i for i in tokenizer("").input_ids[:1] if i == tokenizer.bos_token_id]

    def in_pieces(text, hidden=()):
        ids = []
        for piece in border.split(text):
            if piece in special:
                ids.append(special[piece])
            elif piece:
                ids += tokenise(tokenizer, reveal(piece, hidden), split_special=True)
        return ids

    def encode(question):
        messages = messages_of(question)
        text = write(messages)
        hidden_messages, hidden = hide(messages, forged)
        if not hidden:
            ids = tokenise(tokenizer, text)
        else:
            hidden_text = write(hidden_messages)
            if reveal(hidden_text, hidden) != text:
                raise Unusable("the chat template reads a special token that the text spells")
            # Sentencepiece may begin every piece with the sign that it puts at the beginning of a
            # text, others take the white space beside a special token away: not as one text.
            harmless = re.sub(SLOT_PATTERN, "", hidden_text)
            if in_pieces(harmless) != tokenise(tokenizer, harmless):
                raise Unusable("the text spells a special token, which this tokenizer cannot take")
            ids = in_pieces(hidden_text, hidden)
        if not ids:
            raise Unusable("prompt of no tokens")
        if ids[:1] != bos:
            ids = bos + ids
        return tuple(ids)

    return encode


def hide(messages: list[dict], forged: re.Pattern) -> tuple[list[dict], list[str]]:
    """The messages with a numbered slot for each match in their text, and what stood there."""
    hidden = []

    def slot(match):
        hidden.append(match[0])
        return f"{SLOT}{len(hidden) - 1}{SLOT}"

    messages = [turn | {"content": forged.sub(slot, turn["content"])} for turn in messages]
    return messages, hidden


def reveal(text: str, hidden: list[str]) -> str:
    return re.sub(SLOT_PATTERN, lambda slot: hidden[int(slot[1])], text)
