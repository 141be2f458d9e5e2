"""Chooses tokens from logits that are split among processes by tokens of the vocabulary."""

from collections.abc import Sequence, Set

import torch

from replicas.model.logit_rules import Row
from replicas.model.parallel import Parallel, VocabPart
from replicas.model.sampler import Sampled, choose, lines_of, sample


class SplitSampler:
    """Does what `sample` does with whole rows; all of the processes call it with the same rows."""

    def __init__(
        self, vocab_size: int, mask_token_id: int | None, eos_token_ids: Set[int], parallel: Parallel
    ):
        self._vocab_size = vocab_size
        self._mask_token_id = mask_token_id
        self._eos_token_ids = eos_token_ids
        self._parallel = parallel
        self._part = VocabPart.of(vocab_size, parallel)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, rows: Sequence[Row], greedy: Sequence[int]) -> Sampled | None:
        """This process's part of logits [W, width] -> tokens, probabilities and most probable ones of all W
        rows, on rank 0; None on the others. Overwrites logits.

        greedy: the rows, ascending, of which the most probable token is all that is asked
        """
        best = self._most_probable(lines_of(logits, greedy)) if greedy else ([], [])
        taken = set(greedy)
        others = [index for index in range(len(rows)) if index not in taken]
        sampled: Sampled = ([], [], {})
        if others:
            whole = self._parallel.gather(lines_of(logits, others), self._vocab_size)
            if self._parallel.rank == 0:
                asking = [rows[index] for index in others]
                sampled = sample(whole, asking, self._mask_token_id, self._eos_token_ids)
        if self._parallel.rank > 0:
            return None
        tokens, probs = [0] * len(rows), [0.0] * len(rows)
        for indices, (ids, values) in ((greedy, best), (others, sampled[:2])):
            for index, token, prob in zip(indices, ids, values, strict=True):
                tokens[index], probs[index] = token, prob
        return tokens, probs, {others[index]: top for index, top in sampled[2].items()}

    def _most_probable(self, logits: torch.Tensor) -> tuple[list[int], list[float]]:
        logits = self._part.without_padding(logits.float())
        columns, log_sums = choose(logits, self._part.column(self._mask_token_id))
        largest = logits.gather(1, columns[:, None]).squeeze(1)
        largest, tokens, log_sums = self._parallel.best(largest, columns + self._part.first, log_sums)
        return tokens.tolist(), (largest - log_sums).double().exp_().tolist()
