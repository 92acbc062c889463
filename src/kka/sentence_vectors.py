"""Captions to vectors: TF-IDF reduced by SVD, which needs no model, or any text model on this machine."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

from kka.errors import UserError
from kka.language_models import first_sentence

TFIDF = "tfidf"
BATCH = 64


def encode_sentences(
    sentences: Sequence[str], encoder: str, dim: int, seed: int, device: torch.device
) -> Tensor:
    """(N,) sentences -> (N, D) float32 on the CPU.

    Args:
        sentences: at least one; TF-IDF learns its weights from them.
        encoder: "tfidf", a folder, or the hub id of a model in the cache.
        dim: largest D of TF-IDF; a model has its own.
        seed: of the SVD.
        device: of a model.

    Raises UserError if the model is not there or the sentences have no words.
    """
    if encoder == TFIDF:
        return tfidf_vectors(sentences, dim, seed)
    return model_vectors(sentences, encoder, device)


def tfidf_vectors(sentences: Sequence[str], dim: int, seed: int) -> Tensor:
    """(N,) sentences -> (N, D), D the number of words where that is at most `dim`."""
    try:
        weights = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b").fit_transform(sentences)
    except ValueError:
        raise UserError("the captions of the normal images have no words; mend the caption lists") from None
    if weights.shape[1] <= dim:
        return torch.from_numpy(weights.toarray()).float()
    svd = TruncatedSVD(min(dim, len(sentences)), random_state=seed)
    return torch.from_numpy(svd.fit_transform(weights)).float()


@torch.no_grad()
def model_vectors(sentences: Sequence[str], encoder: str, device: torch.device) -> Tensor:
    """(N,) sentences -> (N, D): the mean over the tokens of the last layer of a transformers model."""
    tokenizer, model = _load(encoder)
    model = model.to(device).eval()
    vectors = []
    for start in range(0, len(sentences), BATCH):
        part = list(sentences[start : start + BATCH])
        tokens = tokenizer(part, padding=True, truncation=True, return_tensors="pt").to(device)
        states = model(**tokens).last_hidden_state.float()
        mask = tokens["attention_mask"][..., None].float()
        vectors.append(((states * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu())
    return torch.cat(vectors)


def _load(encoder: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=True)
        model = AutoModel.from_pretrained(encoder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(
            f"--text_encoder {encoder} is no text model on this machine ({first_sentence(error)}); "
            f"give {TFIDF}, a folder, or the hub id of a model that was downloaded before"
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"  # on the left it would shift the positions of the words
    return tokenizer, model
