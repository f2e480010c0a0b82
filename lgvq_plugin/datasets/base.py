"""The contract of a data set: captioned images in taming's batch convention."""

from abc import abstractmethod
from typing import Any

from torch.utils.data import Dataset


class CaptionedImages(Dataset):
    """Images with captions.

    A sample is `{"image": float32 array (H, W, 3) in [-1, 1], "caption": str, "captions":
    list[str], "file": str, "index": int}`; `channel_first=True` gives (3, H, W). An image
    without a caption has `caption == ""` and takes no part in the text losses.

    The caption, crop and flip of a sample are drawn from (seed, epoch, index), so they are the
    same for any number of workers and after a resume; :meth:`set_epoch` moves the stream on.
    """

    seed: int = 0
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw other captions, crops and flips from now on."""
        self.epoch = epoch

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]: ...


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack images to a (B, ...) tensor and keep strings and lists of captions as lists.

    Example:
        >>> import numpy as np
        >>> image = np.zeros((2, 2, 3), np.float32)
        >>> batch = collate([{"image": image, "caption": "a dog", "captions": ["a dog"]}] * 2)
        >>> batch["image"].shape, batch["caption"]
        (torch.Size([2, 2, 2, 3]), ['a dog', 'a dog'])
    """
    import numpy as np
    import torch

    batch: dict[str, Any] = {key: [sample[key] for sample in samples] for key in samples[0]}
    for key, values in batch.items():
        if isinstance(values[0], np.ndarray | torch.Tensor):
            batch[key] = torch.stack([torch.as_tensor(value) for value in values])
        elif isinstance(values[0], int | float):
            batch[key] = torch.tensor(values)
    return batch
