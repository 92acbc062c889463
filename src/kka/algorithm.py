"""Algorithm 1 of KKA, as the paper writes it; loop.py says what each step does with files."""

from collections.abc import Iterator
from typing import Any

from kka.loop import Loop


def run_kka(loop: Loop) -> Iterator[dict[str, Any]]:
    """Algorithm 1. Yields a row after each round, for the table."""
    examples = loop.represent()  # 2: captions of representative normal images, Eq. (1)-(2)
    loop.describe(0, examples)  # 3: captions of anomalies, Eq. (3)
    loop.draw(0)  # 3: their images, Eq. (4)
    loop.build(0)  # 4: the anomaly set
    yield loop.detect(0)  # 5a, 5b: confusion evaluator, hard and easy anomalies, Eq. (5)-(6)
    if loop.n_rounds:
        loop.compare(examples)  # what the LLM gives untuned, for the table
    for k in range(1, loop.n_rounds + 1):
        loop.tune(k)  # 5c: the LLM prefers hard ones, Eq. (7)
        loop.describe(k, examples)  # 5d: new captions by the tuned LLM
        loop.draw(k)  # 5d: their images
        loop.build(k)  # 5d: hard ones are added to the set, or replace easy ones, Eq. (8)
        yield loop.detect(k)
    # 6: the last set and its detector are in the last round's folder
