"""Visual question answering: choose the answer from a question and the frozen codes.

question --ProbeTransformer, codes as memory--> first state --> one of the training answers
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..metrics.answers import exact_accuracy, majority, vote_accuracy
from ..metrics.captions import tokenize_words
from .features import BATCH, FrozenCodes
from .trainer import COUNT, LossFunction, NeuralProbe, ProbeConfig
from .transformer import PAD, CodeMemory, ProbeTransformer, Words, trim


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
