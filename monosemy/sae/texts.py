"""Token files made of another's text: longer rows than an SAE was trained on, and chat messages."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from monosemy.corpus import TokenFile
from monosemy.llm.model import LanguageModel
from monosemy.runtime import InputError, random_stream


def contexts(tokens: TokenFile, length: int, split: str, seed: int) -> TokenFile:
    """Documents cut into rows of exactly `length` tokens, in a random order; what is left of each is dropped.

    Raises `InputError` if no document is so long.
    """
    sizes = torch.zeros(int(tokens.document.max()) + 1, dtype=torch.int64)
    sizes.index_add_(0, tokens.document.long(), tokens.lengths)
    held_out = torch.zeros(len(sizes), dtype=torch.bool)
    held_out[tokens.document.long()] = tokens.validation
    usable = [int(n) for n in (sizes >= length).nonzero() if split == "all" or held_out[n]]
    if not usable:
        longest = int(sizes[held_out].max() if split == "validation" else sizes.max())
        raise InputError(f"context_lengths holds {length}, but the longest document has {longest} tokens")
    rows, documents = [], []
    for document in usable:
        sentences = (tokens.document == document).nonzero().squeeze(1)  # one after the other
        ids = tokens.ids[tokens.starts[sentences[0]] : tokens.starts[sentences[-1] + 1]]
        for start in range(0, len(ids) - length + 1, length):
            rows.append(ids[start : start + length])
            documents.append(document)
    order = random_stream(seed, length).permutation(len(rows)).tolist()
    return _with_rows(tokens, [rows[i] for i in order], [documents[i] for i in order])


def chat_messages(tokens: TokenFile, model: LanguageModel, sentences: np.ndarray) -> TokenFile:
    """Every sentence as the message of a user. Raises `InputError` if the model has no chat template."""
    tokenizer, rows = model.tokenizer, []
    for number in sentences.tolist():
        text = tokenizer.decode(tokens.sentence(number).tolist())
        message = tokenizer.chat([{"role": "user", "content": text.strip()}])
        rows.append(torch.tensor(tokenizer.encode(message), dtype=torch.int32))
    return _with_rows(tokens, rows, tokens.document[sentences].tolist())


def _with_rows(tokens: TokenFile, rows: list[Tensor], documents: list[int]) -> TokenFile:
    lengths = torch.tensor([0, *map(len, rows)], dtype=torch.int64)
    return replace(
        tokens, ids=torch.cat(rows), starts=lengths.cumsum(0), document=torch.tensor(documents, dtype=torch.int32),
        validation=torch.ones(len(rows), dtype=torch.bool),
    )  # fmt: skip
