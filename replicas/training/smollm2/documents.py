"""Chats as token ids: prompts to answer, and the answers that the model gave. Files are safetensors."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """ids: int64 [n, longest], padded at the end; lengths: int64 [n]."""

    ids: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], pad_id: int, width: int | None = None) -> "Prompts":
        """width: what to pad to; None is the longest prompt's length."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids = torch.full((len(prompts), width or int(lengths.max())), pad_id)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        return cls(ids, lengths)

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: Tensor) -> "Prompts":
        return Prompts(self.ids[index], self.lengths[index])

    @classmethod
    def save(cls, path: Path, splits: Mapping[str, "Prompts"]) -> None:
        """One file of several splits, such as "train"; without padding, for vocabularies up to 65,536."""
        tensors = {}
        for name, prompts in splits.items():
            real = torch.arange(prompts.ids.shape[1]) < prompts.lengths[:, None]
            tensors[f"{name}.tokens"] = prompts.ids[real].to(torch.uint16)
            tensors[f"{name}.lengths"] = prompts.lengths.to(torch.int32)
            tensors[f"{name}.width"] = torch.tensor([prompts.ids.shape[1]])
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path, split: str) -> "Prompts":
        tensors = load_file(path)
        lengths, width = tensors[f"{split}.lengths"].long(), int(tensors[f"{split}.width"])
        ids = torch.zeros(len(lengths), width, dtype=torch.long)
        ids[torch.arange(width) < lengths[:, None]] = tensors[f"{split}.tokens"].long()
        return cls(ids, lengths)


@dataclass(frozen=True)
class Documents:
    """Prompts with their answers.

    ids: int64 [n, clean], padded at the end; prompt_lens, lengths: int64 [n], of the prompt and of prompt
    and answer; ended: bool [n], whether the last token is an end of text, or the answer was cut.
    """

    ids: Tensor
    prompt_lens: Tensor
    lengths: Tensor
    ended: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_answer_tokens(self) -> int:
        return int((self.lengths - self.prompt_lens).sum())

    def rows(self, index: Tensor) -> "Documents":
        return Documents(*(part[index] for part in self._parts))

    def to(self, device: torch.device) -> "Documents":
        return Documents(*(part.to(device) for part in self._parts))

    @property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.ids, self.prompt_lens, self.lengths, self.ended

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        names = ("ids", "prompt_lens", "lengths", "ended")
        parts = {name: part.cpu().int() for name, part in zip(names, self._parts, strict=True)}
        save_file(parts, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    @classmethod
    def load(cls, paths: Iterable[Path]) -> "Documents":
        """Of one or more files, in their order."""
        files = [load_file(path) for path in paths]
        parts = {name: torch.cat([file[name] for file in files]) for name in files[0]}
        ids, prompt_lens, lengths = (parts[name].long() for name in ("ids", "prompt_lens", "lengths"))
        return cls(ids, prompt_lens, lengths, parts["ended"].bool())
