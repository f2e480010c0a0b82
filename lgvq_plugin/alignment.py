"""Alignment: codes and captions in, one weighted sum of objectives out; the heads live here.

Codes --code-ViT--> CodeView --|
captions --guide--> Caption ---|--> objectives --> sum of weight * term, and what to log
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from .config import LGVQConfig, ObjectivesConfig
from .finite import MOST_SKIPPED, all_finite
from .functional import batch_perplexity, join_levels, seeded, world_size
from .guides.base import AbstractGuide
from .heads import CodeViT
from .objectives import AbstractObjective, Caption
from .sockets import ConfigError, resolve
from .types import Codes, CodeView, Term

logger = logging.getLogger(__name__)

MOST_SKIPPED_BROKEN = 3
PAPER_GRID = (16, 16)
PATIENCE = 5  # training batches without any caption before it is an error
Captions = Sequence[str | Sequence[str] | None]


class Alignment(nn.Module):
    """The heads of LG-VQ and the frozen guide beside them; objectives of weight 0 are not built.

    Args:
        config: the `lgvq:` block.
        guide: frozen text model; not a submodule, so in no checkpoint, EMA copy or DDP bucket.
        code_dim: C, width of a code.
        grid: (h, w) that the code-ViT's positions are trained for.

    Attributes:
        expects_captions: raise if none of the first training batches has a caption; false once
            one had, or where the data set is known to have some.

    The heads' first weights and all later draws come from `config.seed`, never from torch's
    global generators, so that the host's own random stream stays as it is without us.
    """

    def __init__(
        self,
        config: LGVQConfig,
        guide: AbstractGuide,
        *,
        code_dim: int,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.guide, self.code_dim = config, guide, code_dim
        self._places: dict[str, tuple[int, int]] = {}  # split: last step, its batches so far
        self._told: set[str] = set()
        self._skipped: dict[str, int] = {}  # objective: steps in a row that left it out
        self.expects_captions, self._captionless = True, 0
        with seeded(config.seed):
            self.code_vit = CodeViT(
                code_dim,
                width=config.code_vit.width,
                depth=config.code_vit.depth,
                heads=config.code_vit.heads,
                out_dim=guide.token_dim,
                grid=config.grid or grid or PAPER_GRID,
            )
            self.objectives = nn.ModuleDict(_objectives(config, guide, code_dim))

    def forward(
        self, codes: Codes, captions: Captions, *, step: int = 0, split: str = "train"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of the objectives and its parts.

        Args:
            codes: of B images.
            captions: B entries; a string, several of which one is drawn, or None or "" for an
                image without a caption, which takes no part.
            step: batches trained so far; masks and captions are drawn from (seed, step).
            split: prefix of the log's keys.

        Raises:
            ConfigError: if the codes or the number of captions do not fit, or none of the first
                training batches has a caption.
            FloatingPointError: for a term that is not finite (`on_nonfinite: raise`).
        """
        self._check(codes, captions)
        generator = self._generator(step, split)
        strings = [_draw(caption, generator) for caption in captions]
        if self.expects_captions and self.training and torch.is_grad_enabled():
            self._wait_for_captions(any(strings))
        log = _codebook_log(codes, split)
        scale = self.scale(step) if split == "train" else 1.0
        if scale == 0.0 or (not any(strings) and world_size() == 1):
            if not any(strings):
                self._tell_once("no captions in a batch: it trains the base loss alone")
            # Other ranks may have captions, and DDP waits for a gradient of every parameter.
            nothing = zero_of(self) if world_size() > 1 else codes.codes.new_zeros(())
            return nothing, log
        view, caption = self._see(codes, strings, generator)
        terms: dict[str, Term] = {n: each(view, caption) for n, each in self.objectives.items()}
        bad = self._not_finite(terms, step, split)
        total: Tensor = torch.zeros((), device=codes.codes.device)
        for name, term in terms.items():
            log[f"{split}/lgvq/{name}"] = term.value.detach()
            log |= {f"{split}/lgvq/{key}": value for key, value in term.log.items()}
            if name in bad:  # the code-ViT too: it may be the only objective
                total = total + zero_of(self)
            else:
                total = total + scale * self.weight(name) * term.value
        log[f"{split}/lgvq/total"] = total.detach()
        return total, log

    def _wait_for_captions(self, is_there: bool) -> None:
        self.expects_captions = not is_there
        self._captionless += not is_there
        if self._captionless >= PATIENCE:
            raise ConfigError(
                f"none of the first {PATIENCE} training batches has a caption, so the objectives "
                "of LG-VQ learn nothing. A batch carries a list of captions under `caption` (or "
                "`text`, `txt`; lgvq.caption_key names another): taming's own data sets have none, "
                "those of lgvq_plugin.datasets do, as data.train.target: "
                "lgvq_plugin.datasets.folder.CaptionedFolder. To train without text, use the "
                "host's own loss; if captions come later, set loss.alignment.expects_captions = "
                "False"
            )

    def view(self, codes: Codes) -> CodeView:
        """Return the code-ViT's view of codes, with the codebook's gradient if it is on."""
        if self.config.codebook_gradient:
            codes = _with_codebook_gradient(codes)
        seen = self.code_vit(codes.codes, codes.grid)
        return CodeView(codes, seen[:, 0], seen[:, 1:])

    def weight(self, name: str) -> float:
        """Return the configured weight of an objective."""
        return float(getattr(self.config.objectives, name).weight)

    def _see(
        self, codes: Codes, strings: list[str], generator: torch.Generator
    ) -> tuple[CodeView, Caption]:
        device = codes.codes.device
        if self.guide.device != device:
            self.guide.to(device)
        present = torch.tensor([bool(string) for string in strings], device=device)
        features = self.guide.encode(strings)
        return self.view(codes), Caption(strings, present, features, self.guide, generator)

    def _check(self, codes: Codes, captions: Captions) -> None:
        _check_captions(captions)
        batch, _, width = codes.codes.shape
        if width != self.code_dim:
            raise ConfigError(
                f"lgvq.code_dim: the heads were built for codes of width {self.code_dim}, the "
                f"quantizer gives {width}; set lgvq.code_dim: {width}"
            )
        if len(captions) != batch:
            lengths = {len(c) if isinstance(c, list | tuple) else -1 for c in captions}
            hint = "; torch's default_collate turns lists of captions over"
            raise ConfigError(
                f"{len(captions)} captions for {batch} images: expected one entry per image "
                f"(a string, a list of strings, or None){hint if lengths == {batch} else ''}. "
                "The codes are those of the last forward pass: was there another one, of a batch "
                "of another size, between the model's and its loss?"
            )

    def _generator(self, step: int, split: str = "train") -> torch.Generator:
        last, count = self._places.get(split, (-1, 0))
        count = count + 1 if step == last else 0
        self._places[split] = (step, count)
        rank = torch.distributed.get_rank() if world_size() > 1 else 0
        seed = torch.tensor([self.config.seed, step, count, rank], dtype=torch.int64)
        primes = torch.tensor([998_244_353, 1_000_003, 7_919, 104_729], dtype=torch.int64)
        return torch.Generator().manual_seed(int((seed * primes).sum()) & (2**63 - 1))

    def scale(self, step: int) -> float:
        """Return the share of the weights at `step`: 0 before `start`, then up to 1 by `ramp`.

        From `stop` on it is 0 again.
        """
        if self.config.stop is not None and step >= self.config.stop:
            return 0.0
        done = step - self.config.start
        if done < 0:
            return 0.0
        return min(1.0, (done + 1) / (self.config.ramp + 1))

    def _not_finite(self, terms: dict[str, Term], step: int, split: str) -> list[str]:
        """Return the names of terms that are not finite; one read from the device for all."""
        if not terms:
            return []
        values = torch.stack([term.value.detach().float() for term in terms.values()]).tolist()
        bad = {n: value for n, value in zip(terms, values, strict=True) if not math.isfinite(value)}
        if split == "train":
            self._skipped = {name: self._skipped.get(name, 0) + 1 for name in bad}
        for name, value in bad.items():
            told = f"step {step}: lgvq objective {name} is {value}"
            if self.config.on_nonfinite == "raise":
                raise FloatingPointError(
                    f"{told}; lower the learning rate or its weight, or set lgvq.on_nonfinite: skip"
                )
            self._give_up(told, self._skipped.get(name, 0))
            logger.warning("%s; left out of this step", told)
        return list(bad)

    def _give_up(self, told: str, skipped: int) -> None:
        """Raise if a term was left out too often: for ever, where a head itself is broken."""
        broken = [key for key, p in self.named_parameters() if not all_finite([p])]
        if skipped < (MOST_SKIPPED_BROKEN if broken else MOST_SKIPPED):
            return
        if broken:
            more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
            raise FloatingPointError(
                f"{told}: the heads' own weights are not finite ({broken[0]}{more}), which no "
                "later step mends; go on from an older checkpoint with a lower learning rate"
            )
        raise FloatingPointError(
            f"{told}, left out {skipped} steps in a row (lgvq.on_nonfinite: skip); lower the "
            "learning rate or its weight, or take the objective out (weight: 0)"
        )

    def _tell_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.warning("%s", message)


def zero_of(module: nn.Module) -> Tensor:
    """Return 0 with a gradient path to every parameter, whatever its value: DDP waits for all.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> zero_of(layer).backward()
        >>> layer.weight.grad
        tensor([[0.]])
    """
    parts = [p.flatten()[:0].sum() for p in module.parameters() if p.requires_grad]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def _objectives(
    config: LGVQConfig, guide: AbstractGuide, code_dim: int
) -> dict[str, AbstractObjective]:
    chosen = {each.name: getattr(config.objectives, each.name) for each in fields(ObjectivesConfig)}
    return {
        name: resolve("objectives", name)(own, guide=guide, code_dim=code_dim)
        for name, own in chosen.items()
        if own.weight > 0
    }


def _check_captions(captions: Any) -> None:
    """Refuse a text or a batch where a list is needed, and entries that are no texts.

    Raises:
        ConfigError: if `captions` is not a list of texts, of lists of texts, or None.
    """
    is_list = hasattr(captions, "__len__") and not isinstance(captions, str | bytes | Mapping)
    for entry in captions if is_list else [captions]:
        is_several = hasattr(entry, "__len__") and not isinstance(entry, bytes | Mapping | Tensor)
        texts = entry if is_several and not isinstance(entry, str) else [entry]
        if not is_list or not all(text is None or isinstance(text, str) for text in texts):
            raise ConfigError(
                "captions must be a list with one entry per image (a string, a list of strings, "
                f"or None), got {captions!r:.80}"
            )


def _draw(caption: str | Sequence[str] | None, generator: torch.Generator) -> str:
    """Return one caption, "" for none; several: one of them."""
    if caption is None or isinstance(caption, str):
        return (caption or "").strip()
    kept = [text.strip() for text in caption if text and text.strip()]
    if not kept:
        return ""
    return kept[int(torch.randint(len(kept), (), generator=generator))]


def _with_codebook_gradient(codes: Codes) -> Codes:
    """Add e_k - sg(e_k): the value stays, and the objectives' gradient reaches the codebook too."""
    if codes.levels:
        return join_levels({k: _with_codebook_gradient(each) for k, each in codes.levels.items()})
    if codes.codebook is None or codes.indices is None or not codes.codebook.requires_grad:
        raise ConfigError(
            "lgvq.codebook_gradient: this host's quantizer has no codebook that takes a gradient "
            "(moving averages or look-up free); set codebook_gradient: false"
        )
    chosen = codes.codebook[codes.indices]
    return replace(codes, codes=codes.codes + (chosen - chosen.detach()))


def _codebook_log(codes: Codes, split: str) -> dict[str, Tensor]:
    """Usage (share of codes) and perplexity of this batch; for levels, of each and the mean."""
    if codes.levels:
        logs = {name: _codebook_log(each, split) for name, each in codes.levels.items()}
        keys = dict.fromkeys(key for log in logs.values() for key in log)
        means = {k: torch.stack([log[k] for log in logs.values() if k in log]).mean() for k in keys}
        head = f"{split}/codebook/"
        return means | {
            f"{head}{name}/{key.removeprefix(head)}": value
            for name, log in logs.items()
            for key, value in log.items()
        }
    if codes.indices is None or codes.codebook is None:
        return {}
    chosen = codes.indices.flatten()
    counts = torch.zeros(len(codes.codebook), device=chosen.device)  # bincount reads the device
    counts.index_add_(0, chosen, torch.ones_like(chosen, dtype=counts.dtype))
    usage = (counts > 0).float().mean()
    return {
        f"{split}/codebook/usage": usage,
        f"{split}/codebook/perplexity": batch_perplexity(counts),
    }
