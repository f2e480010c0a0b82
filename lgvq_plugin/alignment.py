"""Alignment: codes, captions and images in, one weighted sum of objectives out; it owns the heads.

codes --code-ViT-----> CodeView --|
images --image guide------^       |--> objectives --> sum of weight * term, and what to log
captions --text guide--> Caption -|
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from .config import LGVQConfig, is_share
from .functional import MAX_SKIPPED, all_finite, batch_perplexity, join_levels, seeded, world_size
from .guides.base import AbstractGuide, AbstractImageGuide, build_guide, build_image_guide
from .heads import CodeViT
from .objectives import Caption, MaskedText, complete_old_heads, without_text
from .quantizer_hook import GradientBalance
from .sockets import ConfigError, resolve
from .types import Codes, CodeView, Term, TextFeatures, TextTokens

logger = logging.getLogger(__name__)

MAX_SKIPPED_BROKEN = 3  # updates in a row without a term, if the heads' own weights are not finite
PAPER_GRID = (16, 16)
PATIENCE = 5  # training batches without any caption before it is an error
Captions = Sequence[str | Sequence[str] | None]
Row = tuple[Tensor, Tensor]
"""Features of a caption, (Ds,), and of its tokens, (T, Dt) or (0, Dt)."""


class Alignment(nn.Module):
    """The heads of LG-VQ and their frozen guides; objectives of weight 0 are not built.

    The heads' initial weights and all later draws come from `config.seed`, never from torch's
    global generators, so the host's own random stream is the same as without LG-VQ.

    Args:
        config: the `lgvq:` block.
        guide: frozen text model; not a submodule, so in no checkpoint, EMA copy or DDP bucket.
            None if no objective reads text.
        code_dim: C, width of a code.
        grid: (h, w) of the code-ViT's position embeddings; `config.grid` takes precedence.
        vision: frozen image tower, likewise; None if no objective reads "vision".

    Attributes:
        expects_captions: raise if none of the first training batches has a caption; set to False
            by the first caption, or where the data set is known to have some.
        acted: the objectives had a weight in a batch since the last update; set to False by what
            checks gradients before updates, which drops the zeros that DDP needs otherwise.
        alone: only the heads train, so that every batch is aligned; set by `lgvq train`.
        batches: training batches so far in which the schedule gives a weight; the first and each
            `config.every`-th are aligned. In no state dict: `lgvq train` keeps it.
        first_step: step at which the heads began to train, int64 scalar, -1 before; shares of the
            run are counted from there, so that a retrofit of a half-trained host is aligned.
    """

    def __init__(
        self,
        config: LGVQConfig,
        guide: AbstractGuide | None,
        *,
        code_dim: int,
        grid: tuple[int, int] | None = None,
        vision: AbstractImageGuide | None = None,
    ) -> None:
        super().__init__()
        self.config, self.code_dim, self.vision = config, code_dim, vision
        self.guide: Any = guide  # an AbstractGuide, or None
        self.expects_captions, self._batches_without = True, 0
        self._draws: dict[str, tuple[int, int]] = {}  # split: last step, its batches so far
        self._skipped: dict[str, int] = {}  # objective: steps in a row that left it out
        self._warned: set[str] = set()
        self.schedule = Schedule(config)
        self.acted, self.alone, self.batches = False, False, 0
        self.first_step = nn.Buffer(torch.tensor(-1))
        self._first: int | None = None  # `first_step` on the CPU
        self.register_load_state_dict_pre_hook(_set_first_step)
        view_dim = code_dim if vision is None else vision.feature_dim
        view_dim = view_dim if guide is None else guide.token_dim
        self.code_vit: CodeViT | None
        with seeded(config.seed):
            self.code_vit = CodeViT(
                code_dim,
                width=config.code_vit.width or max(code_dim, config.code_vit.min_width),
                depth=config.code_vit.depth,
                heads=config.code_vit.heads,
                out_dim=view_dim,
                grid=config.grid or grid or PAPER_GRID,
            )
            self.objectives = nn.ModuleDict()
            self.weights: dict[str, float] = {}
            for path, own in config.objectives.items():
                name = path.replace(":", ".").rpartition(".")[2]
                if own.weight > 0:
                    if name in self.weights:
                        raise ConfigError(f"lgvq.objectives: two are named {name}: {path}")
                    objective = resolve("objectives", path)
                    options: dict[str, Any] = {"guide": guide, "code_dim": code_dim}
                    if "vision" in objective.reads:
                        options |= {"vision": vision, "view_dim": view_dim}
                    self.objectives[name] = objective(own, **options)
                    self.weights[name] = float(own.weight)
        members: list[Any] = [*self.objectives.values()]
        if members and not any(each.needs_view for each in members):
            self.code_vit = None
        if config.compile:
            decoders = [each.decoder for each in members if isinstance(each, MaskedText)]
            for network in (self.code_vit, *decoders):
                if network is not None:
                    network.compile()  # in place: the names of its weights stay
        self.needs_captions = any(each.needs_captions for each in members)
        self.works_without_captions = not all(each.needs_captions for each in members)
        needs_tokens = any(each.needs_tokens for each in members)
        self.texts = CaptionEncoder(tokens=needs_tokens, megabytes=config.feature_cache)

    def forward(
        self,
        codes: Codes,
        captions: Captions | None,
        *,
        step: int = 0,
        split: str = "train",
        progress: tuple[int, int] | None = None,
        balance: GradientBalance | None = None,
        images: Tensor | None = None,
        reconstructions: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of the objectives, and what to log.

        Args:
            codes: codes of B images.
            captions: B entries: a string, several of which one is drawn, or None or "" for an
                image without a caption, which does not contribute. None or [] is a batch without
                captions, if no objective needs them.
            step: batches trained so far; masks and captions are drawn from (seed, step).
            split: prefix of the log's keys.
            progress: (steps done, steps in all) of the run, for a schedule in shares; None if the
                length is unknown, which `stop: auto` accepts.
            balance: takes the schedule's share of this step; its ratio is logged.
            images, reconstructions: of the host, (B, 3, H, W), for objectives that use them.

        Raises:
            ConfigError: if the codes or the number of captions do not fit, none of the first
                training batches has a caption, an objective reads images and there are none, or a
                share of a run of unknown length is asked for.
            FloatingPointError: for a term that is not finite (`on_nonfinite: raise`).
        """
        captions = self._checked(codes, captions)
        generator = self._generator(step, split)
        strings = [_draw(caption, generator) for caption in captions]
        self._count_batches_without(any(strings))
        log = _codebook_log(codes, split)
        share = scale = self.scale(step, self._share_of(progress))
        strength = 1
        if split != "train":  # validation ignores the schedule
            scale = 1.0
        elif share > 0:
            strength = self._strength(only_heads=self.alone or not codes.codes.requires_grad)
            share *= strength
            scale = share if balance is None else scale * min(strength, 1)
            self.acted = self.acted or scale > 0
        has_work = any(strings) or self.works_without_captions
        if scale > 0 and (has_work or world_size() > 1):  # other ranks may have captions
            view = replace(self.view(codes), images=images, reconstructions=reconstructions)
            if self.vision is not None:
                view = self._with_vision(view, self.vision)
            terms = self._terms(view, strings, generator)
            total = self._weighted_sum(terms, scale, step, split, log)
        elif world_size() > 1:  # DDP waits for a gradient of every parameter
            total = zero_of(self)
        else:
            total = codes.codes.new_zeros(())
            if strength == 0 and torch.is_grad_enabled():  # a loop may call its backward
                total = total.requires_grad_() * 1
        if balance is not None:
            balance.scale = share
            if balance.measured is not None and split == "train":
                log[f"{split}/lgvq/gradient_ratio"] = balance.measured
        return total, log

    def _terms(
        self, view: CodeView, strings: list[str], generator: torch.Generator
    ) -> dict[str, Term]:
        """Return what each objective makes of a batch."""
        caption, masked = self._read(strings, generator, view.cls.device)
        terms: dict[str, Term] = {}
        for name, objective in self.objectives.items():
            mask, features = masked.get(name, (None, None))
            terms[name] = objective(view, replace(caption, mask=mask, masked=features))
        return terms

    def _weighted_sum(
        self, terms: dict[str, Term], scale: float, step: int, split: str, log: dict[str, Tensor]
    ) -> Tensor:
        bad = self._handle_nonfinite(terms, step, split)
        total: Tensor = torch.zeros((), device=self.first_step.device)
        for name, term in terms.items():
            log[f"{split}/lgvq/{name}"] = term.value.detach()
            log |= {f"{split}/lgvq/{key}": value for key, value in term.log.items()}
            if name in bad:  # a gradient for the code-ViT too: this may be the only objective
                total = total + zero_of(self)
            else:
                total = total + scale * self.weight(name) * term.value
        log[f"{split}/lgvq/total"] = total.detach()
        return total

    def _read(
        self, strings: list[str], generator: torch.Generator, device: torch.device
    ) -> tuple[Caption, dict[str, tuple[Tensor, TextFeatures]]]:
        """Return captions with their features, and mask and masked features by objective."""
        if self.guide is None:
            return without_text(strings, generator, device), {}
        if self.guide.device != device:
            self.guide.to(device)
        tokens = self.guide.tokenize(strings)
        masks: dict[str, Tensor] = {}
        for name, member in self.objectives.items():
            objective: Any = member
            if objective.draws_mask:
                mask = objective.draw_mask(strings, tokens, self.guide, generator)
                masks[name] = mask.cpu() & (tokens.word_ids >= 0).cpu()
        whole, *masked = self.texts.encode(self.guide, strings, tokens, [*masks.values()], device)
        pairs = zip(masks.values(), masked, strict=True)
        caption = Caption(strings, tokens, whole, self.guide, generator)
        return caption, dict(zip(masks, pairs, strict=True))

    def _with_vision(self, view: CodeView, vision: AbstractImageGuide) -> CodeView:
        """Add the features of the images that the codes were made of."""
        images, count = view.images, len(view.codes.codes)
        if images is None or len(images) != count:
            given = "none" if images is None else f"{len(images)} of them"
            members: dict[str, Any] = dict(self.objectives.items())
            names = ", ".join(name for name, each in members.items() if "vision" in each.reads)
            raise ConfigError(
                f"{names} reads the {count} images of the codes, and this loss got {given}. After "
                "attach give them: handle.loss(captions, images=images), in [-1, 1]. A host's loss "
                "is called with them as `inputs`, as taming's is"
            )
        if vision.device != view.cls.device:
            vision.to(view.cls.device)
        return replace(view, vision=vision.encode(images))

    def view(self, codes: Codes) -> CodeView:
        """Return the code-ViT's view of codes, with the codebook's gradient if configured."""
        if self.config.codebook_gradient:
            codes = _with_codebook_gradient(codes)
        if self.code_vit is None:
            batch, count, _ = codes.codes.shape
            nothing = codes.codes.new_zeros(batch, 1 + count, 0)
            return CodeView(codes, nothing[:, 0], nothing[:, 1:])
        tokens = self.code_vit(codes.codes, codes.grid)
        return CodeView(codes, tokens[:, 0], tokens[:, 1:])

    def weight(self, name: str) -> float:
        """Return the configured weight of an objective."""
        return self.weights[name]

    def scale(self, step: int, share: float | None = None) -> float:
        """Return the schedule's factor of the weights, in [0, 1]; see :class:`Schedule`."""
        return self.schedule.scale(step, share)

    def _strength(self, *, only_heads: bool) -> int:
        """Return `every` in each `every`-th training batch, else 0; 1 where only the heads train.

        The first batch is aligned too, once as strong, so that what is wrong shows at once. Batches
        are counted here: hosts' steps may skip numbers, as Lightning's do with two optimizers, or
        repeat them, as with accumulated gradients.
        """
        self.batches += 1
        if self.batches % self.config.every == 0 and not only_heads:
            return self.config.every
        return int(only_heads or self.batches == 1)

    def _share_of(self, progress: tuple[int, int] | None) -> float | None:
        """Return the share of the run since the heads began to train; None if no key needs it."""
        if not self.schedule.has_shares:
            return None
        if progress is None and not self.schedule.needs_length:  # stop: auto
            return None
        if progress is None:
            raise ConfigError(
                f"{self.schedule} needs the length of the training, which is unknown here: set "
                "lgvq.total_steps to the number of steps, or give steps instead of shares"
            )
        done, total = progress
        first = self._first
        if first is None:
            first = int(self.first_step)
            if first < 0:
                first = done
                if self.training and torch.is_grad_enabled():
                    self.first_step.fill_(first)
            self.schedule.require_order(total - first)
            self._first = first if self.training else None
        return min(1.0, (done - first) / max(1, total - first))

    def _checked(self, codes: Codes, captions: Captions | None) -> Captions:
        """Return one entry per image; ConfigError if captions or codes do not fit."""
        batch, _, width = codes.codes.shape
        if not self.needs_captions and (captions is None or len(captions) == 0):
            captions = [None] * batch
        _require_list_of_captions(captions)
        assert captions is not None
        if width != self.code_dim:
            raise ConfigError(
                f"lgvq.code_dim: the heads were built for codes of width {self.code_dim}, the "
                f"quantizer gives {width}; set lgvq.code_dim: {width}"
            )
        if len(captions) != batch:
            lengths = {len(c) if isinstance(c, list | tuple) else -1 for c in captions}
            hint = "; torch's default_collate transposes lists of captions"
            raise ConfigError(
                f"{len(captions)} captions for {batch} images: expected one entry per image "
                f"(a string, a list of strings, or None){hint if lengths == {batch} else ''}. "
                "The codes are those of the last forward pass: was there another one, of a batch "
                "of another size, between the model's and its loss?"
            )
        trained = self.config.grid or codes.grid
        if self.code_vit is not None and tuple(trained) != tuple(codes.grid):
            self._warn_once(
                f"lgvq.grid: {[*trained]}, but the codes have a {codes.grid[0]} x "
                f"{codes.grid[1]} grid: the code-ViT interpolates its position embeddings; leave "
                f"the key out, or set lgvq.grid: {[*codes.grid]}, to train them for this grid"
            )
        return captions

    def _count_batches_without(self, has_captions: bool) -> None:
        if not self.needs_captions:
            return
        if not has_captions:
            self._warn_once("no captions in a batch: it trains the base loss alone")
        if not (self.expects_captions and self.training and torch.is_grad_enabled()):
            return
        self.expects_captions = not has_captions
        self._batches_without += not has_captions
        if self._batches_without >= PATIENCE:
            raise ConfigError(
                f"none of the first {PATIENCE} training batches has a caption, so the objectives "
                "of LG-VQ learn nothing. A batch needs a list of captions under `caption` (or "
                "`text`, `txt`; lgvq.caption_key names another): taming's own data sets have none, "
                "those of lgvq_plugin.datasets do, as data.train.target: "
                "lgvq_plugin.datasets.folder.CaptionedFolder. To train without text, use the "
                "host's own loss; if captions come later, set loss.alignment.expects_captions = "
                "False"
            )

    def _generator(self, step: int, split: str = "train") -> torch.Generator:
        step, (last, count) = int(step), self._draws.get(split, (-1, 0))
        count = count + 1 if step == last else 0
        self._draws[split] = (step, count)
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if is_distributed else 0
        seed = 998_244_353 * self.config.seed + 1_000_003 * step + 7_919 * count + 104_729 * rank
        return torch.Generator().manual_seed(seed & (2**63 - 1))

    def _handle_nonfinite(self, terms: dict[str, Term], step: int, split: str) -> list[str]:
        """Raise, or warn and return the names of terms to leave out; one read from the device."""
        if not terms:
            return []
        values = torch.stack([term.value.detach().float() for term in terms.values()]).tolist()
        bad = {n: value for n, value in zip(terms, values, strict=True) if not math.isfinite(value)}
        if split == "train":
            self._skipped = {name: self._skipped.get(name, 0) + 1 for name in bad}
        for name, value in bad.items():
            what = f"step {step}: lgvq objective {name} is {value}"
            if self.config.on_nonfinite == "raise":
                raise FloatingPointError(
                    f"{what}; lower the learning rate or its weight, or set lgvq.on_nonfinite: skip"
                )
            self._raise_if_unrecoverable(what, self._skipped.get(name, 0))
            logger.warning("%s; left out of this step", what)
        return list(bad)

    def _raise_if_unrecoverable(self, what: str, skipped: int) -> None:
        broken = [key for key, p in self.named_parameters() if not all_finite([p])]
        if broken and skipped >= MAX_SKIPPED_BROKEN:
            more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
            raise FloatingPointError(
                f"{what}: the heads' own weights are not finite ({broken[0]}{more}), which no "
                "later step fixes; resume from an older checkpoint with a lower learning rate"
            )
        if skipped >= MAX_SKIPPED:
            raise FloatingPointError(
                f"{what}, left out {skipped} steps in a row (lgvq.on_nonfinite: skip); lower the "
                "learning rate or its weight, or disable the objective (weight: 0)"
            )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("%s", message)


AUTO_STOP = 0.7
"""What `stop: auto` is as a share of the run."""


class Schedule:
    """When the objectives act: from `start`, growing over `ramp`, until `stop`.

    Each is a number of steps or a share of the run. `stop: auto` is a share, or no stop.
    """

    def __init__(self, config: LGVQConfig) -> None:
        self.start, self.ramp = config.start, config.ramp
        fits = self.start == 0 or (is_share(self.start) and self.start < AUTO_STOP)
        self.is_auto = config.stop == "auto" and fits
        self.stop = None if config.stop == "auto" else config.stop
        given = [key for key in ("start", "ramp", "stop") if is_share(getattr(self, key))]
        if self.is_auto:
            self.stop = AUTO_STOP
        self.shares = {key: is_share(getattr(self, key)) for key in ("start", "ramp", "stop")}
        self.has_shares, self.needs_length = any(self.shares.values()), bool(given)
        self._given = ", ".join(f"lgvq.{key}: {getattr(self, key)}" for key in given)

    def __str__(self) -> str:
        return self._given

    def scale(self, step: int, share: float | None = None) -> float:
        """Return the factor of the weights, in [0, 1].

        Args:
            step: batches trained so far.
            share: of the run so far, in [0, 1]; None if no key is a share, or if the length of the
                run is unknown with `stop: auto`, which then never stops.

        >>> schedule = Schedule(LGVQConfig(ramp=0.1, stop=0.5))
        >>> [schedule.scale(0, share) for share in (0.0, 0.05, 0.4, 0.5)]
        [0.0, 0.5, 1.0, 0.0]
        >>> [Schedule(LGVQConfig()).scale(0, share) for share in (0.0, 0.69, 0.7, None)]
        [1.0, 1.0, 0.0, 1.0]
        """
        places = {True: share or 0.0, False: float(step)}
        if self.stop is not None and places[self.shares["stop"]] >= self.stop:
            return 0.0
        in_shares = self.shares["start"] or self.shares["ramp"]
        done = places[in_shares] - self.start
        if done < 0:
            return 0.0
        if in_shares:
            return min(1.0, done / self.ramp) if self.ramp else 1.0
        return min(1.0, (done + 1) / (self.ramp + 1))

    def require_order(self, length: int) -> None:
        """Raise ConfigError if a run of `length` steps would end before it starts."""
        if self.stop is None or self.is_auto:
            return
        first = self.start * length if self.shares["start"] else self.start
        end = self.stop * length if self.shares["stop"] else self.stop
        if first >= end:
            raise ConfigError(
                f"lgvq.stop: {self.stop} (step {end:g} of {length}) is not after lgvq.start: "
                f"{self.start}: nothing would be aligned; give both in steps, both as shares, or "
                "stop: null"
            )


def guides_read(config: LGVQConfig) -> set[str]:
    """Return which guides the objectives with a weight read.

    >>> from .config import parse
    >>> sorted(guides_read(parse({"objectives": {"vision_alignment": {"weight": 1}}})))
    ['text', 'vision']
    """
    return {each for member in _active(config) for each in member.reads}


def needs_captions(config: LGVQConfig) -> bool:
    """Return whether an objective with a weight learns nothing without captions."""
    return any(member.needs_captions for member in _active(config))


def _active(config: LGVQConfig) -> list[Any]:
    return [resolve("objectives", name) for name, own in config.objectives.items() if own.weight]


def build_guides(config: LGVQConfig) -> tuple[AbstractGuide | None, AbstractImageGuide | None]:
    """Build the text and the image guide; None for one that no objective reads.

    Raises:
        ConfigError: if a guide is missing or its block is wrong.
    """
    read, vision = guides_read(config), config.guides.get("vision")
    if "vision" in read and not vision:
        raise ConfigError(
            "lgvq.guides.vision: the objectives need an image tower and none is given; for "
            "instance guides: {vision: {use: timm, model: vit_base_patch14_dinov2.lvd142m}}"
        )
    with torch.random.fork_rng(devices=[]):  # a guide may draw initial weights
        text = build_guide(config.guide) if "text" in read else None
        return text, build_image_guide(vision) if vision and "vision" in read else None


def _set_first_step(heads: Any, state: dict[str, Tensor], prefix: str, *unused: Any) -> None:
    """Accept heads of version 0.1, and read the buffer anew; pre-hook of `load_state_dict`."""
    heads._first = None
    complete_old_heads(state, prefix)


class CaptionEncoder:
    """Encodes the captions of a step, whole and masked, in one call.

    Features of whole captions are kept, so that they cost nothing from the second epoch on. On a
    CPU each is then encoded alone: its features do not depend on the rest of the batch, so a
    resumed run, which has forgotten them, continues bit-identically.

    Args:
        tokens: keep the features of tokens, too.
        megabytes: MiB of kept features at most; further captions are encoded each time.
    """

    def __init__(self, *, tokens: bool, megabytes: int) -> None:
        self.tokens, self.megabytes = tokens, megabytes
        self.forget()

    def forget(self) -> None:
        """Drop all features."""
        self._kept: dict[str, Row] = {}
        self._bytes = 0
        self._source: tuple[AbstractGuide, torch.device] | None = None

    def encode(
        self,
        guide: AbstractGuide,
        strings: Sequence[str],
        tokens: TextTokens,
        masks: Sequence[Tensor],
        device: torch.device,
    ) -> list[TextFeatures]:
        """Return features of B captions, and of the same under each mask.

        Args:
            guide: encodes.
            strings: B captions.
            tokens: their tokens, on the CPU.
            masks: tokens to mask, each (B, max_length) bool on the CPU.
            device: the guide's.
        """
        skip = guide.keeps_features and (self.tokens or bool(masks) or guide.depends_on_batch)
        skip = skip or self.megabytes == 0 or len(strings) == 0
        if skip or torch.is_inference_mode_enabled():
            return _encode(guide, strings, strings, masks)
        if self._source != (guide, device):
            self.forget()
            self._source = guide, device
            self._vocabulary = guide.vocabulary
        new = [text for text in dict.fromkeys(strings) if text not in self._kept]
        fresh: dict[str, Row] = {}
        if new and device.type == "cpu":
            fresh = self._keep(new, guide.encode_apart(new))
            new = []
        masked: list[TextFeatures] = []
        if new or masks:
            whole, *masked = _encode(guide, new, strings, masks)
            fresh |= self._keep(new, whole)
        rows = [fresh[text] if text in fresh else self._kept[text] for text in strings]
        return [self._join(rows, tokens, device), *masked]

    def _keep(self, texts: Sequence[str], features: TextFeatures) -> dict[str, Row]:
        """Return the rows by caption, kept as long as there is room."""
        sentences = features.sentence.clone()  # not a view of a batch with masked captions
        tokens = (features.tokens if self.tokens else features.tokens[:, :0]).clone()
        rows = {text: (sentences[i], tokens[i]) for i, text in enumerate(texts)}
        for text, row in rows.items():
            size = sum(part.nbytes for part in row)
            if self._bytes + size > self.megabytes * 2**20:
                break
            self._kept[text] = row
            self._bytes += size
        return rows

    def _join(self, rows: Sequence[Row], tokens: TextTokens, device: torch.device) -> TextFeatures:
        longest = int(tokens.attention_mask.sum(dim=1).max())
        sentence = torch.stack([row[0] for row in rows])
        of_tokens = nn.utils.rnn.pad_sequence([row[1] for row in rows], batch_first=True)
        is_cuda = device.type == "cuda"  # elsewhere a copy that is not waited for may be a race
        parts = (tokens.token_ids, tokens.attention_mask, tokens.word_ids)
        ids, mask, words = (p[:, :longest].to(device, non_blocking=is_cuda) for p in parts)
        of_tokens = of_tokens[:, :longest]
        return TextFeatures(ids, mask, words, of_tokens, sentence, self._vocabulary)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CaptionEncoder":
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "megabytes": self.megabytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _encode(
    guide: AbstractGuide, new: Sequence[str], strings: Sequence[str], masks: Sequence[Tensor]
) -> list[TextFeatures]:
    """Encode `new`, and `strings` under each mask, in one call."""
    mask = None
    if masks:
        mask = torch.cat([masks[0].new_zeros(len(new), masks[0].shape[1]), *masks])
    features = guide.encode([*new, *(text for _ in masks for text in strings)], mask)
    sizes = [len(new), *(len(strings) for _ in masks)]
    names = [each.name for each in fields(features)[:-1]]
    parts: list[Sequence[Tensor]] = [getattr(features, name).split(sizes) for name in names]
    return [
        replace(features, **dict(zip(names, rows, strict=True)))
        for rows in zip(*parts, strict=True)
    ]


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


def _require_list_of_captions(captions: Any) -> None:
    def is_several(entry: Any) -> bool:
        return hasattr(entry, "__len__") and not isinstance(entry, str | bytes | Mapping | Tensor)

    is_list = hasattr(captions, "__len__") and not isinstance(captions, str | bytes | Mapping)
    entries = captions if is_list else ()
    texts = [text for each in entries for text in (each if is_several(each) else [each])]
    if not is_list or not all(text is None or isinstance(text, str) for text in texts):
        raise ConfigError(
            "captions must be a list with one entry per image (a string, a list of strings, "
            f"or None), got {captions!r:.80}"
        )


def _draw(caption: str | Sequence[str] | None, generator: torch.Generator) -> str:
    """Return one caption of an image, "" if it has none."""
    if caption is None or isinstance(caption, str):
        return (caption or "").strip()
    kept = [text.strip() for text in caption if text and text.strip()]
    return kept[int(torch.randint(len(kept), (), generator=generator))] if kept else ""


def _with_codebook_gradient(codes: Codes) -> Codes:
    """Add e_k - sg(e_k): same value, and the objectives' gradient reaches the codebook too."""
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
    """Usage (share of codes) and perplexity of this batch; of several levels, each and the mean."""
    head = f"{split}/codebook/"
    if codes.levels:
        logs = {name: _codebook_log(each, split) for name, each in codes.levels.items()}
        keys = dict.fromkeys(key for log in logs.values() for key in log)
        means = {k: torch.stack([log[k] for log in logs.values() if k in log]).mean() for k in keys}
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
    return {f"{head}usage": usage, f"{head}perplexity": batch_perplexity(counts)}
