"""What the LLM is asked (Eq. 3): the paper's two requests, with the captions of representative normal images.

The same text is the prompt of the preference pairs (Eq. 7), so that tuning moves what generation samples.
"""

import hashlib
from collections.abc import Sequence

from kka.datasets.layout import DataSetSpec
from kka.errors import UserError


def generation_prompt(spec: DataSetSpec, examples: Sequence[str]) -> str:
    """The request for one caption of an anomaly, given captions of normal images.

    Raises UserError if there is no example.
    """
    if not examples:
        raise UserError(
            f"{spec.title}: there are no captions of normal images to show the LLM; "
            "add captions to the data set or give some with --examples"
        )
    shown = "\n".join(f"- {example.strip()}" for example in examples)
    return spec.prompt.format(examples=shown)


def prompt_digest(prompt: str) -> str:
    """SHA-256 of a prompt, for manifests."""
    return hashlib.sha256(prompt.encode()).hexdigest()
