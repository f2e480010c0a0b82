"""Probes of language: words masked in a caption, the caption itself, and answers to questions.

caption --mask words--> guide --> transformer --cross-attention--> frozen codes --> masked words
codes --CodeMemory--> memory --cross-attention--> next word, next word, ... --> caption
question --ProbeTransformer, codes as memory--> first state --> one of the training answers

Masked words: do the codes contain the words that are masked in the caption? The network is trained
on frozen codes, so it is the same for a baseline, which has no heads, and an LG-VQ model, whose
heads are not used. `leak_free` masks the words before the guide reads the caption. `leaky` is the
released code's protocol: the guide has read them all, so every later token still contains
information about them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...guides.base import AbstractGuide
from ...types import TextTokens
from ..metrics.answers import exact_accuracy, majority, vote_accuracy
from ..metrics.captions import caption_scores, tokenize_words
from .features import BATCH, FrozenCodes, require_captions
from .trainer import COUNT, LossFunction, NeuralProbe, ProbeConfig, generator_at, pick
from .transformer import (
    END,
    PAD,
    START,
    UNKNOWN,
    Cache,
    CodeMemory,
    ProbeTransformer,
    Words,
    trim,
    used_length,
)

PROTOCOLS = {
    "leak_free": "words hidden before the text encoder",
    "leaky": "released code's protocol: words hidden after the text encoder, which leaks them",
}


@dataclass(frozen=True, kw_only=True)
class MaskedWordsConfig(ProbeConfig):
    """Training of the masked-word probe."""

    steps: Annotated[int, COUNT] = 400
    """Updates per protocol."""
    most_hidden: Annotated[int, COUNT] = 3
    """Training masks 1 to this many words per caption, >= 1."""
    leaky: bool = True
    """Whether an evaluation also runs the leaky protocol, for comparison; doubles the time."""


class MaskedWordsProbe(NeuralProbe[MaskedWordsConfig, Any]):
    """Fill in masked words of captions, which `guide` reads; `protocol`: leak_free or leaky."""

    Config = MaskedWordsConfig

    def __init__(
        self,
        guide: AbstractGuide,
        config: MaskedWordsConfig | None = None,
        *,
        protocol: Literal["leak_free", "leaky"] = "leak_free",
        **options: Any,
    ):
        super().__init__(config, **options)
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {(*PROTOCOLS,)}, got {protocol!r}")
        self.guide, self.protocol, self.name = guide, protocol, f"masked_words_{protocol}"

    def _build(
        self, codes: FrozenCodes, target: Sequence[Sequence[str]]
    ) -> tuple[LossFunction, int, list[Any]]:
        require_captions(codes, target)
        config = self.config
        counts = _count_tokens(self.guide, target)
        self.network = _Filler(codes, self.guide, counts, config).to(self.device)

        def loss_of(rows: Tensor, generator: torch.Generator) -> Tensor:
            chosen = pick(target, rows, torch.rand(len(rows), generator=generator))
            tokens = self.guide.tokenize(chosen)
            number = torch.randint(1, config.most_hidden + 1, (len(rows),), generator=generator)
            masked = mask_words(tokens, number, generator)
            if not masked.any():
                return self.network.head.bias.sum() * 0
            (logits,) = self._logits(chosen, masked, [codes.codes(rows)])
            return F.cross_entropy(logits, self._targets(tokens, masked))

        return loss_of, len(codes), [target, self.protocol, self.guide.fingerprint]

    def evaluate(
        self, codes: FrozenCodes, target: Sequence[str], *, seed: int = 0
    ) -> dict[str, float]:
        """Return `mask_N/recall@k` for N = 1 and 3 masked words of one caption per image.

        `mask_N/words` is the number of masked words; the control has the prefix `shuffled/`.
        """
        results: dict[str, float] = {}
        several = {"": codes, "shuffled/": codes.shuffled(seed)}
        for number in (1, 3):
            values = self.named_values(several, target, number, seed)
            results |= {name: sum(shares) / max(len(shares), 1) for name, shares in values.items()}
            name = f"mask_{number}"
            results[f"{name}/words"] = float(number * len(values[f"{name}/recall@1"]))
        return results

    def recall(
        self, codes: FrozenCodes, captions: Sequence[str], *, masked: int, seed: int = 0
    ) -> dict[str, float]:
        """Return the means of :meth:`values`, and `words`, the number of masked words."""
        values = self.values(codes, captions, masked=masked, seed=seed)
        means = {name: sum(value) / max(len(value), 1) for name, value in values.items()}
        return means | {"words": float(masked * len(values["recall@1"]))}

    def values(
        self, codes: FrozenCodes, captions: Sequence[str], *, masked: int, seed: int = 0
    ) -> dict[str, list[float]]:
        """Return `recall@1` and `recall@5` of each caption, the shares of masked words found.

        Args:
            codes: of held-out images.
            captions: one per image; those with fewer than `masked` + 1 words are skipped.
            masked: number of words masked per caption.
            seed: of the choice of words, which is the same for any host.
        """
        return self.values_of([codes], captions, masked=masked, seed=seed)[0]

    def named_values(
        self, several: Mapping[str, FrozenCodes], captions: Sequence[str], masked: int, seed: int
    ) -> dict[str, list[float]]:
        """Return :meth:`values` for codes by prefix, as `PREFIXmask_N/recall@k`."""
        found = self.values_of([*several.values()], captions, masked=masked, seed=seed)
        return {
            f"{prefix}mask_{masked}/{name}": shares
            for prefix, values in zip(several, found, strict=True)
            for name, shares in values.items()
        }

    @torch.no_grad()
    def values_of(
        self, several: Sequence[FrozenCodes], captions: Sequence[str], *, masked: int, seed: int = 0
    ) -> list[dict[str, list[float]]]:
        """Return :meth:`values` for several codes; the guide reads the captions once for all."""
        found: list[dict[int, list[float]]] = [{1: [], 5: []} for _ in several]
        for part, rows in enumerate(torch.arange(len(captions)).split(BATCH // 2)):
            texts = [captions[row] for row in rows.tolist()]
            tokens = self.guide.tokenize(texts)
            is_long = tokens.word_ids.amax(dim=1, keepdim=True) >= masked
            numbers = torch.full((len(rows),), masked)
            mask = mask_words(tokens, numbers, generator_at(seed, part)) & is_long
            if not mask.any():
                continue
            targets = self._targets(tokens, mask)[:, None]
            # Tokens of one word have one number; a word is found if all its tokens are.
            length = mask.shape[1]
            words = (torch.arange(len(mask))[:, None] * length + tokens.word_ids.cpu())[mask.cpu()]
            total = torch.bincount(words.unique() // length, minlength=len(rows))
            all_logits = self._logits(texts, mask, [codes.codes(rows) for codes in several])
            for shares_at, logits in zip(found, all_logits, strict=True):
                is_right = logits.topk(min(5, logits.shape[1]), dim=-1).indices == targets
                for k, shares in shares_at.items():
                    missed = words[(~is_right[:, :k].any(dim=1)).cpu()].unique()
                    lost = torch.bincount(missed // length, minlength=len(rows))
                    shares += (1 - lost[total > 0] / total[total > 0]).tolist()
        return [{f"recall@{k}": shares for k, shares in each.items()} for each in found]

    def _logits(
        self, captions: Sequence[str], masked: Tensor, several: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the logits of the masked tokens for each codes."""
        is_free = self.protocol == "leak_free"
        features = self.guide.encode(captions, masked.to(self.guide.device) if is_free else None)
        length = used_length(features.attention_mask)
        inputs = (features.tokens, masked, features.attention_mask)
        text, hidden, attention = (x[:, :length].to(self.device) for x in inputs)
        return [self.network(text, hidden, seen.to(self.device), attention) for seen in several]

    def _targets(self, tokens: TextTokens, masked: Tensor) -> Tensor:
        """Return the class of each masked token; -1 for one that is not in the training set."""
        return self.network.number[tokens.token_ids[masked].to(self.device)]


def mask_words(tokens: TextTokens, number: Tensor, generator: torch.Generator) -> Tensor:
    """Return True at all tokens of `number` (B,) random words of each caption, (B, T) bool.

    At least one word per caption is left.

    Example:
        >>> ids = torch.tensor([[-1, 0, 1, 2, -1], [-1, 0, -1, -1, -1]])
        >>> seed = torch.Generator().manual_seed(0)
        >>> mask_words(TextTokens(ids, ids >= 0, ids), torch.tensor([2, 2]), seed).sum(1).tolist()
        [2, 0]
    """
    ids = tokens.word_ids.cpu()
    batch, length = ids.shape
    words = ids.amax(dim=1, keepdim=True) + 1
    draws = torch.rand(batch, length, generator=generator)
    draws = draws.masked_fill(torch.arange(length) >= words, 2.0)
    count = torch.minimum(number[:, None], (words - 1).clamp(min=0))
    is_masked = draws.argsort(dim=1).argsort(dim=1) < count
    return (is_masked.gather(1, ids.clamp(min=0)) & (ids >= 0)).to(tokens.word_ids.device)


def _count_tokens(guide: AbstractGuide, captions: Sequence[Sequence[str]]) -> Tensor:
    """Return how often each token is part of a word of the captions, (V,) int64."""
    counts = torch.zeros(len(guide.vocabulary), dtype=torch.long)
    flat = [text for texts in captions for text in texts]
    for begin in range(0, len(flat), 512):
        tokens = guide.tokenize(flat[begin : begin + 512])
        found = tokens.token_ids[tokens.word_ids >= 0].cpu()
        counts += torch.bincount(found, minlength=len(counts))
    return counts


class _Filler(nn.Module):
    """Text features with masked words, and codes -> one of the tokens of training captions."""

    number: Tensor

    def __init__(
        self, codes: FrozenCodes, guide: AbstractGuide, counts: Tensor, config: MaskedWordsConfig
    ):
        super().__init__()
        kept = counts.nonzero()[:, 0]
        number = torch.full_like(counts, -1)
        number[kept] = torch.arange(len(kept))
        self.register_buffer("number", number)
        self.memory = CodeMemory(codes, config.width)
        self.in_proj = nn.Linear(guide.token_dim, config.width)
        self.mask_embed = nn.Parameter(torch.empty(config.width).normal_(std=0.02))
        length = guide.max_length
        self.text = ProbeTransformer(config, vocabulary_size=1, length=length, causal=False)
        self.head = nn.Linear(config.width, len(kept))
        with torch.no_grad():  # start from the tokens' frequencies
            self.head.bias.copy_((counts[kept] / counts.sum()).log())

    def forward(self, text: Tensor, masked: Tensor, codes: Tensor, attention: Tensor) -> Tensor:
        """Return the logits of the masked tokens, in row-major order."""
        x = self.in_proj(F.layer_norm(text, text.shape[-1:]))
        x = torch.where(masked[..., None], self.mask_embed, x)
        count = masked.sum(dim=1, keepdim=True)
        read = masked.int().sort(dim=1, descending=True, stable=True).indices[:, : int(count.max())]
        states = self.text(x, self.memory(codes), token_mask=attention, read=read)
        return self.head(states[torch.arange(read.shape[1], device=x.device) < count])


@dataclass(frozen=True, kw_only=True)
class CaptioningConfig(ProbeConfig):
    """Training and decoding of the captioning probe."""

    steps: Annotated[int, COUNT] = 800
    """Updates; 100 epochs in the paper."""
    max_words: Annotated[int, COUNT] = 24
    """Maximum words of a caption, in training and decoding, >= 1."""
    least_count: Annotated[int, COUNT] = 1
    """Words in fewer training captions are unknown, >= 1."""


class CaptioningProbe(NeuralProbe[CaptioningConfig, Sequence[Sequence[str]]]):
    """Write captions from codes."""

    Config, name = CaptioningConfig, "captioning"

    def _build(
        self, codes: FrozenCodes, target: Sequence[Sequence[str]]
    ) -> tuple[LossFunction, int, list[Any]]:
        require_captions(codes, target)
        config, length = self.config, self.config.max_words + 2
        tokenized = [[tokenize_words(text) for text in texts] for texts in target]
        sentences = (text for texts in tokenized for text in texts)
        self.words = Words(sentences, min_count=config.least_count)
        rows = [[*self.words.encode(texts, length=length)] for texts in tokenized]
        self.network = _Captioner(codes, config, len(self.words), length).to(self.device)

        def loss_of(images: Tensor, generator: torch.Generator) -> Tensor:
            draws = torch.rand(len(images), generator=generator)
            tokens = trim(torch.stack(pick(rows, images, draws)).to(self.device))
            memory = self.network.memory(codes.codes(images).to(self.device))
            logits = self.network(tokens[:, :-1], memory)
            return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=PAD)

        return loss_of, len(codes), [tokenized]

    @torch.no_grad()
    def write(self, codes: FrozenCodes) -> list[str]:
        """Return a caption of each image by greedy decoding."""
        written = []
        for rows in torch.arange(len(codes)).split(BATCH // 2):
            memory = self.network.memory(codes.codes(rows).to(self.device))
            written += [self.words.decode(row) for row in self._greedy(memory).tolist()]
        return written

    def evaluate(
        self, codes: FrozenCodes, target: Sequence[Sequence[str]], *, seed: int = 0
    ) -> dict[str, float]:
        """Return `bleu_1` to `bleu_4`, `rouge_l`, `cider_d` of held-out images.

        The control, captions written from the codes of other images, has the prefix `shuffled/`.
        """
        references = [[tokenize_words(text) for text in texts] for texts in target]
        results = caption_scores(self.write(codes), references)
        control = caption_scores(self.write(codes.shuffled(seed)), references)
        return results | {f"shuffled/{name}": value for name, value in control.items()}

    def _greedy(self, memory: Tensor) -> Tensor:
        cache = Cache()
        last = torch.full((len(memory), 1), START, device=memory.device)
        words: list[Tensor] = []
        is_done = torch.zeros(len(memory), dtype=torch.bool, device=memory.device)
        for _ in range(self.config.max_words):
            logits = self.network(last, memory, cache)[:, -1]
            logits[:, [PAD, START, UNKNOWN]] = -torch.inf
            last = logits.argmax(dim=-1, keepdim=True)
            words.append(last)
            is_done |= last[:, 0] == END
            if is_done.all():
                break
        return torch.cat(words, dim=1)


class _Captioner(nn.Module):
    def __init__(self, codes: FrozenCodes, config: CaptioningConfig, words: int, length: int):
        super().__init__()
        self.memory = CodeMemory(codes, config.width)
        self.text = ProbeTransformer(config, vocabulary_size=words, length=length, causal=True)
        self.bias = nn.Parameter(torch.zeros(words))

    def forward(self, tokens: Tensor, memory: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the logits of the next word after each token."""
        states = self.text(tokens, memory, cache=cache)
        return states @ self.text.embed.weight.mT + self.bias


@dataclass(frozen=True)
class Question:
    """A question about an image."""

    row: int  # number of the image among the codes
    text: str
    answer: str  # the correct one, or the most frequent one of several people's
    kind: str = ""  # such as color or count; "" for none
    people: tuple[str, ...] = ()  # the answers of several people (VQA v2), or none


@dataclass(frozen=True, kw_only=True)
class VQAConfig(ProbeConfig):
    """Training of the VQA probe."""

    steps: Annotated[int, COUNT] = 1000
    """Updates; 50 epochs in the paper."""
    max_words: Annotated[int, COUNT] = 22
    """Maximum words of a question, >= 1."""
    least_count: Annotated[int, COUNT] = 1
    """Words in fewer training questions are unknown, >= 1."""
    max_answers: Annotated[int, COUNT] = 3000
    """The most frequent training answers are the classes, >= 1."""


class VQAProbe(NeuralProbe[VQAConfig, Sequence[Question]]):
    """Answer questions from codes."""

    Config, name = VQAConfig, "questions"  # checkpoints have the file name of version 0.1

    def _build(
        self, codes: FrozenCodes, target: Sequence[Question]
    ) -> tuple[LossFunction, int, list[Any]]:
        if not target:
            raise ValueError("there is no question to train on")
        config = self.config
        counts = Counter(question.answer for question in target)
        frequent = sorted(counts, key=lambda answer: (-counts[answer], answer))
        self.answers = frequent[: config.max_answers]
        number = {answer: i for i, answer in enumerate(self.answers)}
        kept = [question for question in target if question.answer in number]
        self.majorities = _majorities(kept)
        texts = [tokenize_words(question.text) for question in kept]
        self.words = Words(texts, min_count=config.least_count)
        tokens = self.words.encode(texts, length=config.max_words + 2)
        images = torch.tensor([question.row for question in kept])
        answers = torch.tensor([number[question.answer] for question in kept])
        network = _Answerer(codes, config, len(self.words), len(self.answers))
        self.network = network.to(self.device)

        def loss_of(rows: Tensor, generator: torch.Generator) -> Tensor:
            logits = self._logits(codes, tokens[rows], images[rows])
            return F.cross_entropy(logits, answers[rows].to(self.device))

        return loss_of, len(kept), [texts, answers.tolist(), images.tolist()]

    @torch.no_grad()
    def answer(self, codes: FrozenCodes, questions: Sequence[Question]) -> list[str]:
        """Return the most likely answer to each question."""
        texts = [tokenize_words(question.text) for question in questions]
        tokens = self.words.encode(texts, length=self.config.max_words + 2)
        images = torch.tensor([question.row for question in questions])
        chosen: list[int] = []
        for rows in torch.arange(len(questions)).split(BATCH):
            chosen += self._logits(codes, tokens[rows], images[rows]).argmax(dim=1).tolist()
        return [self.answers[i] for i in chosen]

    def evaluate(
        self,
        codes: FrozenCodes,
        target: Sequence[Question],
        *,
        seed: int = 0,
        given: Sequence[str] | None = None,
    ) -> dict[str, float]:
        """Return the accuracy on questions about held-out images.

        `accuracy` (exact match), `accuracy/KIND`, and `vote_accuracy` with people's answers.
        Controls: `shuffled/accuracy`, with the codes of other images; `majority/accuracy`, the
        most frequent training answer of the question's kind. `given` are the answers of
        :meth:`answer`, if they are known already.
        """
        given = self.answer(codes, target) if given is None else given
        wanted, kinds = [q.answer for q in target], [q.kind for q in target]
        results = exact_accuracy(given, wanted, kinds if any(kinds) else None)
        if all(question.people for question in target):
            votes = [vote_accuracy(g, q.people) for g, q in zip(given, target, strict=True)]
            results["vote_accuracy"] = sum(votes) / len(votes)
        blind = self.answer(codes.shuffled(seed), target)
        usual = [self.majorities.get(kind, self.majorities[None]) for kind in kinds]
        return results | {
            "shuffled/accuracy": exact_accuracy(blind, wanted)["accuracy"],
            "majority/accuracy": exact_accuracy(usual, wanted)["accuracy"],
        }

    def _logits(self, codes: FrozenCodes, tokens: Tensor, images: Tensor) -> Tensor:
        seen = codes.codes(images).to(self.device)
        return self.network(trim(tokens).to(self.device), seen)


QuestionsProbe, QuestionsConfig = VQAProbe, VQAConfig  # names of version 0.1


def _majorities(questions: Sequence[Question]) -> dict[str | None, str]:
    """Return the most frequent answer of each kind, and that of all under None."""
    answers: dict[str | None, list[str]] = {None: [question.answer for question in questions]}
    for question in questions:
        answers.setdefault(question.kind, []).append(question.answer)
    return {kind: majority(some) for kind, some in answers.items()}


class _Answerer(nn.Module):
    def __init__(self, codes: FrozenCodes, config: VQAConfig, words: int, answers: int):
        super().__init__()
        self.memory = CodeMemory(codes, config.width)
        length = config.max_words + 2
        self.text = ProbeTransformer(config, vocabulary_size=words, length=length, causal=False)
        self.head = nn.Linear(config.width, answers)

    def forward(self, tokens: Tensor, codes: Tensor) -> Tensor:
        first = torch.zeros_like(tokens[:, :1])
        states = self.text(tokens, self.memory(codes), token_mask=tokens != PAD, read=first)
        return self.head(states[:, 0])
