"""Chats as token ids: prompts to answer, and the answers that the model gave. Files are safetensors."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """Prompts as token ids."""

    ids: Tensor
    """int64 [n, longest], padded at the end."""
    lengths: Tensor
    """int64 [n]"""

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], pad_id: int, width: int | None = None) -> "Prompts":
        """Pads the prompts to `width`; None is the longest prompt's length."""
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
        """Writes splits, such as "train", to one file; without padding, for vocabularies up to 65,536."""
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
    """Prompts with their answers."""

    ids: Tensor
    """int64 [n, clean], padded at the end."""
    prompt_lens: Tensor
    """int64 [n], the prompt's length."""
    lengths: Tensor
    """int64 [n], the length of prompt and answer."""
    ended: Tensor
    """bool [n], True if the last token is an end of text, False if the answer was cut."""

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
        """Writes the file whole or not at all."""
        names = ("ids", "prompt_lens", "lengths", "ended")
        parts = {name: part.cpu().int() for name, part in zip(names, self._parts, strict=True)}
        save_file(parts, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    @classmethod
    def load(cls, paths: Iterable[Path]) -> "Documents":
        """Reads the documents of one or more files, in their order."""
        files = [load_file(path) for path in paths]
        parts = {name: torch.cat([file[name] for file in files]) for name in files[0]}
        ids, prompt_lens, lengths = (parts[name].long() for name in ("ids", "prompt_lens", "lengths"))
        return cls(ids, prompt_lens, lengths, parts["ended"].bool())
