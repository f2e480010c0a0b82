"""The trained head as an encoder of images and texts into one space; and heads as files.

codes ---code-ViT, projection of L_gsa---> (B, Ds) <---guide--- texts        both of length 1
folder/  lgvq_heads.safetensors  lgvq_config.json: {defaults, grid, lgvq: the block}
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import DEFAULTS, of_first_version, require, to_block
from .files import read_safetensors, write_bytes, write_json
from .functional import all_finite
from .hub import download
from .objectives import GlobalSemantic, rename_old_heads
from .sockets import ConfigError, as_config_error
from .types import Codes, CodeView

if TYPE_CHECKING:
    from .alignment import Alignment

HEADS_WEIGHTS, HEADS_CONFIG = "lgvq_heads.safetensors", "lgvq_config.json"
SIZES = ("code_vit.in_proj.weight", "code_vit.pos_embed")


@torch.no_grad()
def encode_codes(heads: "Alignment", codes: Codes) -> Tensor:
    """Return what `global_semantic` compares with captions, of length 1, (B, Ds) float32.

    Raises:
        ConfigError: if the heads have no `global_semantic`.
    """
    head, vit = _head_of(heads), heads.code_vit
    assert vit is not None  # the head reads it
    like = vit.cls
    codes = replace(codes, codes=codes.codes.detach().to(like.device, like.dtype))
    with evaluating(heads):
        tokens = vit(codes.codes, codes.grid)
        return F.normalize(head.embed(CodeView(codes, tokens[:, 0], tokens[:, 1:])).float(), dim=-1)


@torch.no_grad()
def encode_text(heads: "Alignment", texts: Sequence[str]) -> Tensor:
    """Return the guide's sentence features of B texts, of length 1, (B, Ds) float32.

    Raises:
        ConfigError: if the heads have no `global_semantic`, or `texts` is no list of strings.
    """
    _head_of(heads)
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"encode_text: expected a list of strings, got {texts!r:.80}")
    guide, device = heads.guide, next(heads.parameters()).device
    if guide.device != device:
        guide.to(device)
    return F.normalize(guide.encode(list(texts)).sentence.float(), dim=-1)


def _head_of(heads: "Alignment") -> GlobalSemantic:
    if "global_semantic" not in heads.objectives:
        trained = ", ".join(heads.objectives) or "none"
        raise ConfigError(
            "encode_image and encode_text need the head of global_semantic, whose weight is 0 "
            f"(trained: {trained}); train with lgvq.objectives.global_semantic.weight > 0"
        )
    return heads.objectives["global_semantic"]  # type: ignore[return-value]


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode, and each of their parts back into its own mode after."""
    modes = {part: part.training for module in modules for part in module.modules()}
    try:
        for part in modes:  # not eval(): a loss wrapper would pass it on to its base loss
            part.training = False
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@dataclass(frozen=True)
class SavedHeads:
    """Heads outside a run.

    Args:
        tensors: their state dict.
        block: the `lgvq:` block that builds them, None if unknown.
        where: file or folder, for messages.
        grid: (h, w) of the position embeddings, None if unknown.
    """

    tensors: Mapping[str, Tensor]
    block: Mapping[str, Any] | None
    where: str
    grid: tuple[int, int] | None = None

    @classmethod
    def of(cls, heads: "Alignment") -> "SavedHeads":
        """Take the state of heads."""
        grid = None if heads.code_vit is None else heads.code_vit.grid
        return cls(heads.state_dict(), to_block(heads.config), "these heads", grid)

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, Tensor], block: Mapping[str, Any] | None, where: str, **more: Any
    ) -> "SavedHeads":
        """Take heads of any version; those of 0.1 get its defaults, `recipe: corrected_v1`."""
        tensors, defaults = dict(tensors), more.pop("defaults", None)
        is_first = "first_step" not in tensors if defaults is None else defaults == 1
        if block is not None and is_first:
            block = of_first_version(block)
        rename_old_heads(tensors, "")
        return cls(tensors, block, where, **more)

    @classmethod
    def read(cls, folder: str | Path) -> "SavedHeads":
        """Read a folder, or a repository `organization/name` of the Hugging Face hub.

        Raises:
            ConfigError: if there are no heads, or a newer version has written them.
        """
        place = Path(folder)
        place = place if place.is_dir() else download(str(folder))
        tensors, file = _read_weights(place), place / HEADS_CONFIG
        kinds = (OSError, ValueError, TypeError, AttributeError)
        hint = "; expected what save_pretrained wrote"
        with as_config_error(f"{file}: cannot be read", *kinds, hint=hint):
            content = json.loads(file.read_text(encoding="utf-8"))
            defaults = int(content.get("defaults", 1))
            grid = tuple(map(int, content.get("grid") or ()))
        if defaults > DEFAULTS:
            raise ConfigError(
                f"{file}: defaults {defaults} are of a newer version; update lgvq_plugin"
            )
        block = content.get("lgvq")
        require(block is None or isinstance(block, Mapping), f"{file}: lgvq", "a mapping", block)
        return cls.from_state(tensors, block, str(place), defaults=defaults, grid=grid or None)

    def write(self, folder: str | Path) -> Path:
        """Write them to a folder, which is created, and return it.

        Raises:
            ConfigError: if a weight is not finite.
        """
        from safetensors.torch import save

        folder = Path(folder)
        _require_finite(self.tensors, self.where)
        state = {key: v.detach().cpu().clone().contiguous() for key, v in self.tensors.items()}
        write_bytes(folder / HEADS_WEIGHTS, save(state))  # save_file's files have mode 600
        grid = self.grid and [*self.grid]
        about = {"defaults": DEFAULTS, "grid": grid, "lgvq": self.block and dict(self.block)}
        write_json(folder / HEADS_CONFIG, about)
        return folder

    @property
    def code_dim(self) -> int:
        """C, width of the codes that the heads read."""
        for key in SIZES:  # the first is missing where codes have the code-ViT's width
            if key in self.tensors and self.tensors[key].ndim:
                return int(self.tensors[key].shape[-1])
        raise ConfigError(f"{self.where}: no {SIZES[1]} among its tensors: these are no heads")

    def grid_on(self, host_grid: tuple[int, int] | None) -> tuple[int, int]:
        """Return (h, w) of the position embeddings: as configured, saved, of the host, or square.

        Raises:
            ConfigError: if none of them has as many positions.
        """
        shape = tuple(self.tensors[SIZES[1]].shape) if SIZES[1] in self.tensors else None
        is_known = shape is not None and len(shape) == 3 and shape[1] > 1
        require(is_known, f"{self.where}: {SIZES[1]}", "a tensor (1, 1 + h × w, D)", shape)
        cells = int(self.tensors[SIZES[1]].shape[1]) - 1
        side = math.isqrt(cells)
        for found in ((self.block or {}).get("grid"), self.grid, host_grid, (side, side)):
            if found and math.prod(found) == cells:
                return int(found[0]), int(found[1])
        raise ConfigError(
            f"{self.where}: position embeddings of {cells} codes, whose grid is unknown; give "
            "grid=(height, width)"
        )

    def load_into(self, heads: "Alignment") -> None:
        """Load the tensors into heads; ConfigError if these are others."""
        with as_config_error(f"{self.where} holds other heads than these", RuntimeError):
            heads.load_state_dict(dict(self.tensors))


def load_heads(heads: "Alignment", folder: Path) -> None:
    """Read heads from `folder`; ConfigError if they are missing or different ones."""
    SavedHeads(_read_weights(folder), {}, str(folder / HEADS_WEIGHTS)).load_into(heads)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / HEADS_WEIGHTS
    if not path.is_file():
        raise ConfigError(f"no heads at {path}; expected what save_pretrained wrote")
    tensors = read_safetensors(path)
    _require_finite(tensors, str(path))
    return tensors


def _require_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    if broken := [key for key, value in tensors.items() if not all_finite([value])]:
        raise ConfigError(f"{where}: {broken[0]} holds NaN or inf: the run diverged")
