"""Visual question answering: choose the answer from a question and the frozen codes.

question --ProbeTransformer, codes as memory--> first state --> one of the training answers
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import require
from ...functional import seeded
from ..metrics.answers import exact_accuracy, majority, vote_accuracy
from ..metrics.captions import tokenize_words
from .base import Question
from .features import FrozenCodes
from .transformer import PAD, CodeMemory, ProbeConfig, ProbeTransformer, Words, fit, trim

PART = 256


@dataclass(frozen=True, kw_only=True)
class QuestionsConfig(ProbeConfig):
    """How the question probe is trained."""

    steps: int = 1000
    """Updates; 50 epochs in the paper."""
    max_words: int = 22
    """A question is cut to so many words, >= 1."""
    least_count: int = 1
    """Words in fewer training questions are unknown ones, >= 1."""
    max_answers: int = 3000
    """The most frequent training answers are the classes, >= 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_words", "least_count", "max_answers"):
            require(getattr(self, name) >= 1, name, "a whole number >= 1", getattr(self, name))


class QuestionsProbe:
    """Answer questions from codes; nothing of the host is trained."""

    Config = QuestionsConfig

    def __init__(
        self, config: QuestionsConfig | None = None, *, device: torch.device | str = "cpu"
    ):
        self.config, self.device = config or QuestionsConfig(), torch.device(device)

    def fit(
        self,
        codes: FrozenCodes,
        questions: Sequence[Question],
        *,
        folder: Path | None = None,
        progress: bool = True,
    ) -> "QuestionsProbe":
        """Train on questions about the images of `codes`.

        Raises:
            ValueError: if there are none.
        """
        if not questions:
            raise ValueError("there is no question to train on")
        config = self.config
        counts = Counter(question.answer for question in questions)
        usual = sorted(counts, key=lambda answer: (-counts[answer], answer))
        self.answers = usual[: config.max_answers]
        number = {answer: i for i, answer in enumerate(self.answers)}
        kept = [question for question in questions if question.answer in number]
        texts = [tokenize_words(question.text) for question in kept]
        self.words = Words(texts, least=config.least_count)
        self.majorities = _majorities(kept)
        tokens = self.words.encode(texts, length=config.max_words + 2)
        images = torch.tensor([question.row for question in kept])
        targets = torch.tensor([number[question.answer] for question in kept])
        with seeded(config.seed):
            network = _Answerer(codes, config, len(self.words), len(self.answers))
        self.network = network.to(self.device)

        def loss_of(rows: Tensor, generator: torch.Generator) -> Tensor:
            seen = codes.codes(images[rows]).to(self.device)
            logits = self.network(trim(tokens[rows]).to(self.device), seen)
            return F.cross_entropy(logits, targets[rows].to(self.device))

        fit(
            self.network,
            loss_of,
            len(kept),
            config,
            name="questions",
            folder=folder,
            progress=progress,
            facts=[codes.fingerprint, texts, targets.tolist(), images.tolist()],
        )
        return self

    @torch.no_grad()
    def answer(self, codes: FrozenCodes, questions: Sequence[Question]) -> list[str]:
        """Return the most likely answer to each question."""
        texts = [tokenize_words(question.text) for question in questions]
        tokens = self.words.encode(texts, length=self.config.max_words + 2)
        images = torch.tensor([question.row for question in questions])
        chosen: list[int] = []
        for rows in torch.arange(len(questions)).split(PART):
            seen = codes.codes(images[rows]).to(self.device)
            chosen += self.network(trim(tokens[rows]).to(self.device), seen).argmax(dim=1).tolist()
        return [self.answers[i] for i in chosen]

    def evaluate(
        self, codes: FrozenCodes, questions: Sequence[Question], *, seed: int = 0
    ) -> dict[str, float]:
        """Return the accuracy on held-out images' questions.

        `accuracy` (exact match), `accuracy/KIND`, `vote_accuracy` where people's answers are
        known; `shuffled/accuracy`: with the codes of other images, so from the question alone;
        `majority/accuracy`: always the training answer that is usual for the question's kind.
        """
        given = self.answer(codes, questions)
        wanted = [question.answer for question in questions]
        kinds = [question.kind for question in questions]
        results = exact_accuracy(given, wanted, kinds if any(kinds) else None)
        if all(question.people for question in questions):
            votes = [vote_accuracy(g, q.people) for g, q in zip(given, questions, strict=True)]
            results["vote_accuracy"] = sum(votes) / len(votes)
        blind = self.answer(codes.shuffled(seed), questions)
        usual = [self.majorities.get(kind, self.majorities[None]) for kind in kinds]
        return results | {
            "shuffled/accuracy": exact_accuracy(blind, wanted)["accuracy"],
            "majority/accuracy": exact_accuracy(usual, wanted)["accuracy"],
        }


def _majorities(questions: Sequence[Question]) -> dict[str | None, str]:
    """Return the usual answer of each kind, and of all under None."""
    kinds = {question.kind for question in questions}
    found: dict[str | None, str] = {None: majority([question.answer for question in questions])}
    for kind in kinds:
        found[kind] = majority([q.answer for q in questions if q.kind == kind])
    return found


class _Answerer(nn.Module):
    def __init__(self, codes: FrozenCodes, config: QuestionsConfig, words: int, answers: int):
        super().__init__()
        some = codes.codes(torch.arange(min(len(codes), 1024)))
        self.memory = CodeMemory(some, config.width)
        self.text = ProbeTransformer(
            config, vocabulary_size=words, length=config.max_words + 2, causal=False
        )
        self.head = nn.Linear(config.width, answers)

    def forward(self, tokens: Tensor, codes: Tensor) -> Tensor:
        states = self.text(tokens, self.memory(codes), token_mask=tokens != PAD)
        return self.head(states[:, 0])
