"""Fills in on the device what a step begun ahead of its turn could not know when it was packed."""

from collections.abc import Mapping

import numpy as np
import torch

from replicas.model.cuda.lookahead import Guess
from replicas.model.cuda.staging import Staging


def fill_in(
    guessed: Guess, tokens: torch.Tensor, parts: Mapping[str, torch.Tensor], staging: Staging
) -> None:
    """Completes the guessed step's token ids from the tokens of the step before it.

    tokens: [W] int64, the outputs of the step before
    parts: the guessed step's (sections_of), changed in place
    """
    sources = staging.send(np.array(guessed.sources, dtype=np.int32))
    parts["token_ids"][: len(guessed.sources)].copy_(tokens.int().index_select(0, sources))
