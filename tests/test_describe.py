"""Asking until there are enough captions: what is written, what is asked again, when it ends."""

import json
import multiprocessing
import os
import signal
import time
from collections import Counter

import pytest
from tiny_models import tiny_glm

from kka.datasets import garden, get_spec
from kka.datasets.layout import Images
from kka.describe import PATIENCE, answers_path, choose_examples, describe, normal_test
from kka.errors import UserError
from kka.language_models import LanguageModelSettings, load_language_model
from kka.prompts import generation_prompt, prompt_digest

EXAMPLES = ["this flower has sparse thin small pink petals and a yellow center"]
PROMPT = generation_prompt(get_spec("flower"), EXAMPLES)
WORDS = ["red", "white", "blue", "brown", "black", "round", "wide", "long", "large", "dark", "rough", "soft"]


class Scripted:
    """Answers request k with `answers(k)`; an exception is raised."""

    adapter = None

    def __init__(self, answers, name="scripted"):
        self.id, self.answers, self.failures, self.seeds = name, answers, Counter(), []

    def complete(self, prompt, n, seed):
        assert prompt == PROMPT
        self.seeds.append(seed)
        answer = self.answers(len(self.seeds) - 1)
        if isinstance(answer, BaseException):
            raise answer
        return answer


def distinct(k):
    """Two new captions for each k below 60."""
    return [
        f"a {WORDS[k % 12]} bloom with {WORDS[k // 12]} {part}"
        for part in ("petals and leaves", "stems or roots")
    ]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def ask(path, answers=distinct, n=7, model="scripted", **options):
    scripted = Scripted(answers, model) if callable(answers) else answers
    return describe(scripted, PROMPT, EXAMPLES, n, 0, path, **options), scripted


def test_a_line_for_each_caption_says_where_it_comes_from(tmp_path):
    path = tmp_path / "captions.jsonl"
    described, model = ask(path, n=3, round=2)
    assert described.captions == [*distinct(0), distinct(1)[0]]
    assert [record["caption"] for record in lines(path)] == described.captions
    assert lines(path)[0] == {
        "caption": distinct(0)[0], "prompt_sha256": prompt_digest(PROMPT), "examples": EXAMPLES,
        "llm": "scripted", "adapter": None, "seed": 0, "round": 2,
    }  # fmt: skip
    assert described.requests == len(set(model.seeds)) == 2


def test_rejected_lines_and_lost_answers_are_counted(tmp_path):
    def answers(k):
        model.failures["content filter"] += 1
        return [
            "",
            "I'm sorry, I cannot do that.",
            EXAMPLES[0],
            "1. a rose\n2. a red rose is here",
            *distinct(k),
        ]

    model = Scripted(answers)
    described, _ = ask(tmp_path / "captions.jsonl", model, n=4, is_normal=lambda caption: "rose" in caption)
    assert described.captions == [*distinct(0), *distinct(1)]
    assert described.rejected == {
        "content filter": 2, "empty": 2, "refusal": 2, "copy of an example": 2, "too short": 2,
        "normal class": 2,
    }  # fmt: skip
    assert "2 refusal" in described.reasons()


@pytest.mark.parametrize("answers", [["a red flower is here"], [], ["", "no"], ["sorry, I cannot help"]])
def test_without_new_captions_it_ends(tmp_path, answers):
    described, model = ask(tmp_path / "captions.jsonl", lambda k: answers, n=9)
    assert described.captions == [a for a in answers if "red" in a]
    assert len(model.seeds) == PATIENCE + len(described.captions)
    assert sum(described.rejected.values()) == len(model.seeds) * len(answers) - len(described.captions)


def test_slow_progress_is_progress(tmp_path):
    described, _ = ask(tmp_path / "captions.jsonl", lambda k: distinct(k) if k % PATIENCE == 0 else [], n=6)
    assert len(described.captions) == 6
    assert described.requests == 2 * PATIENCE + 1


def test_giving_up_is_not_for_ever(tmp_path):
    path = tmp_path / "captions.jsonl"
    assert ask(path, lambda k: [])[0].requests == PATIENCE
    described, model = ask(path)
    assert len(described.captions) == 7
    assert len(model.seeds) == 4
    assert described.requests == PATIENCE + 4


def test_a_finished_call_asks_nothing_and_a_larger_one_goes_on(tmp_path):
    whole = ask(tmp_path / "whole.jsonl", n=11)[0]
    path = tmp_path / "captions.jsonl"
    assert ask(path, n=7)[1].seeds[:2] == ask(tmp_path / "other.jsonl", n=3)[1].seeds
    before = path.read_bytes()
    again, model = ask(path, n=7)
    assert not model.seeds
    assert again.captions == whole.captions[:7]
    assert path.read_bytes() == before
    assert ask(path, n=2)[0].captions == whole.captions[:2]
    more, model = ask(path, lambda k: distinct(k + 4), n=11)  # four requests were answered before
    assert len(model.seeds) == 2
    assert more.captions == whole.captions
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("stop_at", [0, 1, 3])
def test_an_error_keeps_what_has_been_answered(tmp_path, stop_at):
    path = tmp_path / "captions.jsonl"
    with pytest.raises(
        UserError, match=r"no credit; the same command goes on from what .*captions.jsonl holds"
    ):
        ask(path, lambda k: UserError("no credit") if k == stop_at else distinct(k))
    assert len(lines(path)) == 2 * stop_at
    described, _ = ask(path, lambda k: distinct(k + stop_at))
    assert described.captions == ask(tmp_path / "whole.jsonl")[0].captions


def _ask_slowly(path, started):
    def answers(k):
        time.sleep(0.01)
        if k == 5:
            started.set()
        return distinct(k)

    ask(path, answers, n=100)


def test_killed_and_continued_gives_the_same_list(tmp_path):
    path = tmp_path / "captions.jsonl"
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=_ask_slowly, args=(path, started))
    process.start()
    assert started.wait(30)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    done = answers_path(path).read_bytes().count(b"\n")
    assert 5 <= done < 50
    described, _ = ask(path, lambda k: distinct(k + done), n=100)
    assert described.captions == ask(tmp_path / "whole.jsonl", n=100)[0].captions
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("lost", [1, 30, 300, 700])
@pytest.mark.parametrize("which", ["answers", "captions"])
def test_any_unfinished_end_is_mended(tmp_path, which, lost):
    """As a power cut leaves it: the end of one of the files is missing."""
    path = tmp_path / "captions.jsonl"
    whole = ask(path)[0]
    expected = path.read_bytes()
    torn = answers_path(path) if which == "answers" else path
    torn.write_bytes(torn.read_bytes()[:-lost])
    left = sum(1 for line in torn.read_bytes().split(b"\n")[:-1]) if which == "answers" else 4
    if lost == 1:
        left = 4  # only the end of the line is missing
    described, model = ask(path, lambda k: distinct(k + left))
    assert len(model.seeds) == 4 - left
    assert described.captions == whole.captions
    assert path.read_bytes() == expected


def test_a_repeated_caption_is_written_as_often_after_an_interruption(tmp_path):
    def answers(k):
        return ["a red bloom", "a red bloom", f"a {WORDS[k]} stem of {k} leaves"]

    path = tmp_path / "captions.jsonl"
    ask(path, answers, n=8, repeats=3)
    whole = path.read_bytes().splitlines(keepends=True)
    assert sum(b"a red bloom" in line for line in whole) == 3
    for left in range(9):
        path.write_bytes(b"".join(whole[:left]))
        described, model = ask(path, answers, n=8, repeats=3)
        assert not model.seeds
        assert len(described.captions) == 8
        assert path.read_bytes() == b"".join(whole)


def test_captions_of_others_in_the_file_are_not_repeated(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps({"caption": distinct(0)[0]}) + "\n")  # by hand
    first = ask(path, n=3)[0].captions
    second = ask(path, n=3, model="another")[0].captions
    third = ask(path, n=3, round=1, known=distinct(4))[0].captions
    assert first == [distinct(0)[1], *distinct(1)]
    assert second == [*distinct(2), distinct(3)[0]]
    assert third == [distinct(3)[1], *distinct(5)]
    assert [record["caption"] for record in lines(path)] == [distinct(0)[0], *first, *second, *third]


def test_two_processes_do_not_share_a_file(tmp_path):
    path = tmp_path / "captions.jsonl"

    def answers(k):
        with pytest.raises(UserError, match="in use by another process"):
            ask(path)
        return distinct(k)

    assert len(ask(path, answers, n=2)[0].captions) == 2


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("captions.jsonl", '{"caption": 3}\n', "line 1 has no 'caption'"),
        ("captions.jsonl", '{"caption": "a"}\nnonsense\n{}\n', "line 2 is not valid JSON"),
        ("captions.answers.jsonl", "[]\n", "line 1 has no 'answers'"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}, {says}"):
        ask(tmp_path / "captions.jsonl")


@pytest.mark.parametrize("text", ['{"a": 1}\nmy last line', "my only line", '{"a": 1}\n{"mine": '])
def test_file_of_somebody_else_stays_as_it_is(tmp_path, text):
    """Also its last line, which looks like the part of one that a killed process leaves."""
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=r"mine\.jsonl"):
        ask(path)
    assert path.read_text() == text
    assert not answers_path(path).exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        ask(tmp_path / "file" / "captions.jsonl")


def test_strange_answers_are_recorded_as_they_came(tmp_path):
    path = tmp_path / "captions.jsonl"
    ask(path, lambda k: ["\ud800 broken é花\n\u2028", *distinct(k)], n=2)
    assert lines(answers_path(path))[0]["answers"][0] == "\ud800 broken é花\n\u2028"


def test_a_tiny_glm_goes_on_where_it_was_interrupted(tmp_path):
    settings = LanguageModelSettings(model=str(tiny_glm(tmp_path / "glm")), device="cpu", max_new_tokens=40)
    model = load_language_model(settings)
    whole = describe(model, PROMPT, EXAMPLES, 25, 0, tmp_path / "whole.jsonl", ask=8)
    assert len(whole.captions) == len(set(whole.captions)) == 25
    path = tmp_path / "captions.jsonl"
    interrupted = load_language_model(settings)
    complete = interrupted.complete

    def until_ctrl_c(prompt, n, seed):
        if path.exists() and len(lines(path)) > 5:
            raise KeyboardInterrupt
        return complete(prompt, n, seed)

    interrupted.complete = until_ctrl_c
    with pytest.raises(KeyboardInterrupt):
        describe(interrupted, PROMPT, EXAMPLES, 25, 0, path, ask=8)
    assert describe(model, PROMPT, EXAMPLES, 25, 0, path, ask=8).captions == whole.captions
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert describe(model, PROMPT, EXAMPLES, 25, 1, path, ask=8).captions != whole.captions


def test_examples_are_captions_of_different_images():
    captions = [[f"image {i} caption {j}" for j in range(3)] for i in range(6)]
    chosen = choose_examples(captions, 4, 0)
    assert len({caption.split()[1] for caption in chosen}) == 4
    assert chosen == choose_examples(captions, 4, 0)
    assert len({tuple(choose_examples(captions, 4, seed)) for seed in range(9)}) > 1
    assert sorted(choose_examples([["a"], ["a"], [], ["b", " "]], 4, 0)) == ["a", "b"]
    assert choose_examples([(), ()], 1, 0) == []


def test_what_counts_as_normal():
    normals = Images(captions=((*EXAMPLES, "a pink bloom"), ("there are pink flowers on a long green stem",)))
    is_normal = normal_test(get_spec("flower"), normals, (26,))
    assert is_normal("A pink bloom.")
    assert is_normal(EXAMPLES[0] + " there")
    assert not is_normal(EXAMPLES[0].replace("pink", "white"))
    assert not is_normal("the small flower has few thin pink petals around a golden center")


def test_the_garden_reads_captions():
    is_normal = normal_test(garden.SPEC, Images(), (garden.NORMAL,))
    assert is_normal("the tiny flower has few narrow pink petals around a golden center")
    assert not is_normal("the tiny flower has few narrow red petals around a golden center")
    assert not is_normal("the tiny flower has narrow pink petals around a golden center")
    assert not is_normal("nothing of the kind")
