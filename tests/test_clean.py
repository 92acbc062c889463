"""Answers as language models give them, and what becomes of them."""

import random
import time

import pytest

from kka.clean import MAX_WORDS, Cleaner, SimilarTexts, is_near, split_words

PINK = "this flower has pink petals and a yellow center"


def clean(answer, examples=(), **options):
    """Captions of one answer and the counts of what was rejected."""
    cleaner = Cleaner(examples, **options)
    return cleaner.clean(answer), dict(cleaner.rejected)


@pytest.mark.parametrize(
    "answer",
    [
        PINK,
        f"  {PINK}\n\n",
        f"1. {PINK}",
        f"12) {PINK}",
        f"(3) {PINK}",
        f"[4]: {PINK}",
        f"a) {PINK}",
        f"B. {PINK}",
        f"#1: {PINK}",
        f"No. 3: {PINK}",
        f"- {PINK}",
        f"* {PINK}",
        f"• {PINK}",
        f"- [ ] {PINK}",
        f"> {PINK}",
        f"### {PINK}",
        f'"{PINK}"',
        f"'{PINK}'",
        f"`{PINK}`",
        f"“{PINK}”",
        f"«{PINK}»",
        f'"{PINK}",',
        f'"{PINK}',
        f"**{PINK}**",
        f"*{PINK}*",
        "this flower has **pink** petals and a `yellow` center",
        f"**Caption:** {PINK}",
        f"**Caption**: {PINK}",
        f"Answer: {PINK}",
        f"A: {PINK}",
        f"Description 2: {PINK}",
        f"Caption 2 - {PINK}",
        f"Flower A: {PINK}",
        f"The answer: {PINK}",
        f"New caption: {PINK}",
        f"1. **Description:** “{PINK}”",
        f"Sure! {PINK}",
        f"Sure, here is a description of another flower: {PINK}",
        f"Here's one: {PINK}",
        f"Of course! Here are two captions:\n\n1. {PINK}".split("\n\n")[1],
        f"🌸 {PINK} 🌸",
        f"✅ 1. {PINK}",
        f"```\n{PINK}\n```",
        f"```text\n{PINK}\n```",
        f'"caption": "{PINK}",',
        f'{{"caption": "{PINK}"}}',
        f'```json\n["{PINK}"]\n```',
        f"<think>pink? no, I should say white.\n\nYes.</think>\n{PINK}",
        f"I should think first.</think>{PINK}",
        f"{PINK}\n<think>and now",
        f"<|assistant|>\n{PINK}<|endoftext|>",
        f"&quot;{PINK}&quot;",
        f"\ufeff{PINK.replace('pink', 'pi' + chr(0x200B) + 'nk')}",
        "this  flower\thas pink petals\u00a0and a yellow center",
        "this flower has pink petals and a yellow center".replace("flower", "\uff46lower"),
    ],
)
def test_decoration_is_taken_away(answer):
    assert clean(answer) == ([PINK], {})


@pytest.mark.parametrize(
    "caption",
    [
        "the bloom is 3.5 cm wide and white",
        "3 large petals surround a stamen",
        "this flower's petals don't overlap, and they are heart-shaped",
        "a flower like a star: five white points",
        "White Petals. Yellow stamens.",
        "a flower with (mostly) round petals; the stem is green",
        "une fleur aux pétales violets très fins",
        '"lion\'s teeth" is what these "leaves" look like',
        "A photo of a beetle",
    ],
)
def test_ordinary_captions_stay_as_they_are(caption):
    assert clean(caption) == ([caption], {})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "empty"),
        ("\n \n", "empty"),
        ("<think>only thoughts", "empty"),
        ("Here are five descriptions:", "empty"),
        ("Descriptions of other flowers follow:", "chat"),
        ("I hope this helps with the flowers.", "chat"),
        ("Let me know if you need more of them!", "chat"),
        ("Please note that these are flowers", "chat"),
        ("I'm sorry, but there is no such flower.", "refusal"),
        ("As an AI language model, flowers have no meaning to describe.", "refusal"),
        ("It is not possible, I cannot provide descriptions.", "refusal"),
        ("This flower cannot be described as it is inappropriate", "refusal"),
        ("Would a white flower be better?", "question"),
        ('"What colour is this flower?"', "question"),
        ("Question: which flower is it\uff1f", "question"),
        ("pink", "too short"),
        ("pink petals", "too short"),
        ("12 34 56 78", "too short"),
        ("Flower: Rose", "too short"),
        (" ".join(f"word{i}" for i in range(MAX_WORDS + 1)), "too long"),
        ("x" * 600, "too long"),
        ("petal " * 10_000, "too long"),
        ("pink pink pink pink petals", "repetition"),
        ("the flower the flower the flower is the flower", "repetition"),
        ("这朵花有粉红色的花瓣", "other language"),
        ("this flower has розовые petals today", "other language"),
        ("この花はピンクです", "other language"),
        ("this flower\x1b[31m is red and round", "control characters"),
        ("this flower\x00 is red and round", "control characters"),
        ("this flower \ud800 is red and round", "control characters"),
        ("this red flower \ufffd is round", "control characters"),
        ("---", "markup"),
        ("| pink | white | yellow |", "markup"),
        ("<img src=flower.png> a pink flower here", "markup"),
        ("see https://example.org for a flower", "markup"),
        ('{"caption": "this flower has', "markup"),
        ('["this flower has pink petals",', "markup"),
        ("\\frac{petals}{sepals} of a flower", "markup"),
        ("print(flower_name) and so on", "markup"),
    ],
)
def test_rejected_with_a_reason(line, reason):
    assert clean(line) == ([], {reason: 1})


def test_every_line_is_a_caption_of_its_own():
    answer = f"Sure! Here are three:\n\n1. {PINK}\n2. a white bloom with thin petals\n\nWant more?"
    captions, rejected = clean(answer)
    assert captions == [PINK, "a white bloom with thin petals"]
    assert rejected == {"empty": 1, "question": 1}


@pytest.mark.parametrize(
    "answer",
    [
        '["a b c one", "d e f two"]',
        '{"captions": [{"id": 1, "text": "a b c one"}, {"text": "d e f two", "good": true}]}',
        '{"caption": "a b c one"}\n{"caption": "d e f two"}',
        'Sure:\n{"1": "a b c one", "2": "d e f two"}\n',
        '["1. a b c one\\n2. d e f two"]',
    ],
)
def test_json_is_unpacked(answer):
    assert clean(answer)[0] == ["a b c one", "d e f two"]


def test_latin_letters_are_asked_for_only_if_the_examples_have_them():
    chinese = "这朵花有白色的花瓣"
    assert clean(chinese, ["这朵花有粉色的花瓣和叶子"]) == ([chinese], {})
    assert clean(chinese, [PINK]) == ([], {"other language": 1})


def test_copies_duplicates_and_normals_are_told_apart():
    long = "this flower has five wide white petals with thin red stripes on them and a yellow center"
    cleaner = Cleaner(
        [PINK], is_normal=lambda caption: "rose" in caption, known=["an earlier flower is blue"]
    )
    answers = [
        PINK.upper() + ".", "a red rose on a stem", "An earlier flower is blue!", long, long.title(),
        long + " too", long.replace("five ", ""), long.replace("white", "orange"),
    ]  # fmt: skip
    assert [caption for answer in answers for caption in cleaner.clean(answer)] == [
        long, long.replace("white", "orange"),
    ]  # fmt: skip
    assert cleaner.rejected == {
        "copy of an example": 1,
        "normal class": 1,
        "duplicate": 2,
        "near duplicate": 2,
    }


def test_a_caption_may_come_again_if_asked_for():
    cleaner = Cleaner(["a photo of a bed"], known=["a photo of a bus"], repeats=2)
    answer = "a photo of a lamp\nA photo of a lamp.\na photo of a lamp\na photo of a bus\na photo of a sea"
    assert cleaner.clean(answer) == ["a photo of a lamp", "A photo of a lamp.", "a photo of a sea"]
    assert cleaner.rejected == {"duplicate": 2}


def test_normal_captions_are_kept_without_the_test():
    assert clean("a red rose on a stem", is_normal=None)[0] == ["a red rose on a stem"]


def test_the_order_of_words_matters():
    white = "this flower has white petals around a yellow center with a green stem and two leaves"
    swapped = white.replace("white", "?").replace("yellow", "white").replace("?", "yellow")
    assert sorted(split_words(white)) == sorted(split_words(swapped))
    assert clean(f"{white}\n{swapped}")[0] == [white, swapped]


@pytest.mark.parametrize(
    ("n_words", "changes", "near"),
    [
        (8, "remove", False),
        (9, "add", True),
        (10, "remove", True),
        (18, "replace", False),
        (19, "replace", True),
    ],
)
def test_near_means_a_similarity_of_nine_tenths(n_words, changes, near):
    words = [f"w{i}" for i in range(n_words)]
    other = {"add": [*words, "x"], "remove": words[:-1], "replace": ["x", *words[1:]]}[changes]
    shared = n_words - (changes != "add")
    assert (shared / (2 * n_words - shared + {"add": 1, "remove": -1, "replace": 0}[changes]) >= 0.9) == near
    assert is_near(words, other) == is_near(other, words) == near
    assert SimilarTexts([" ".join(words)]).has_near(" ".join(other)) == near
    assert SimilarTexts([" ".join(other)]).has_near(" ".join(words)) == near


def test_the_index_finds_what_comparing_all_finds():
    rng = random.Random(0)
    vocabulary = split_words("a the pink red thin wide round petals center has with and of stem leaf")
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(5, 25))) for _ in range(150)]
    for text in texts[:100]:  # near copies, so that there is something to find
        words = text.split()
        del words[rng.randrange(len(words))]
        texts.append(" ".join(words))
    index, found = SimilarTexts(), 0
    for i, text in enumerate(texts):
        expected = any(is_near(split_words(text), split_words(other)) for other in texts[:i])
        assert index.has_near(text) == expected
        found += expected
        index.add(text)
    assert found > 50


@pytest.mark.parametrize(
    "evil",
    [
        "**a " * 50_000,
        '"' * 200_000,
        "1. " * 50_000,
        "[" * 100_000,
        '{"a":' * 20_000,
        "* " * 900 + "\n",
        "```\n" * 9_000,
    ],
)
def test_hostile_answers_are_quick(evil):
    began = time.process_time()
    assert clean(evil * (20 if len(evil) < 2000 else 1))[0] == []
    assert time.process_time() - began < 2


def test_thousands_of_captions_are_quick():
    captions = [
        f"this flower has {i} petals of kind {i % 97} and a center of colour {i % 89}" for i in range(3000)
    ]
    began = time.process_time()
    assert len(Cleaner(()).clean("\n".join(captions))) == 3000
    assert time.process_time() - began < 5
