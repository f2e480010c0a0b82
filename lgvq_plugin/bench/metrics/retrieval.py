"""Recall at k from a matrix of similarities."""

from collections.abc import Sequence

import torch
from torch import Tensor


def retrieval_recall(
    similarity: Tensor, relevant: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Means of :func:`retrieval_by_query`, whose arguments these are.

    Example:
        >>> retrieval_recall(torch.eye(4), torch.eye(4).bool(), ks=(1,))
        {'recall@1': 1.0, 'mean_rank': 1.0}
        >>> retrieval_recall(torch.zeros(4, 4), torch.eye(4).bool(), ks=())
        {'mean_rank': 2.5}
    """
    values = retrieval_by_query(similarity, relevant, ks)
    return {name: float(value.mean()) for name, value in values.items()}


def retrieval_by_query(
    similarity: Tensor, relevant: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, Tensor]:
    """Is a right item among the k nearest of each query, and which rank has the first?

    Equal similarities count as if their order were drawn at random: the number is the expected
    recall, so features that say nothing give chance level and not 1.

    Args:
        similarity: of Q queries to G items, (Q, G), larger is nearer.
        relevant: (Q, G) bool; several right items a query (captions of one image, images of one
            caption) are fine, the nearest counts.
        ks: how many nearest items to look at.

    Returns:
        `recall@k` for each k, in [0, 1], and `mean_rank`, counted from 1; each (Q,) float64.

    Raises:
        ValueError: on unequal shapes, nan, or a query without a right item.
    """
    if similarity.ndim != 2 or similarity.shape != relevant.shape or not len(similarity):
        raise ValueError(
            f"expected two (Q, G) of one shape, Q >= 1, got {tuple(similarity.shape)} and "
            f"{tuple(relevant.shape)}"
        )
    if similarity.isnan().any():
        raise ValueError("similarity holds nan")
    relevant = relevant.bool()
    if not relevant.any(dim=1).all():
        raise ValueError("some query has no right item; leave it out")
    best = similarity.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)
    before = ((similarity > best) & ~relevant).sum(dim=1).double()
    wrong = ((similarity == best) & ~relevant).sum(dim=1).double()
    right = ((similarity == best) & relevant).sum(dim=1).double()
    recalls = {f"recall@{k}": _hit(k - before, wrong, right) for k in ks}
    # Of `wrong` items mixed with `right` ones, wrong / (right + 1) come before the first right.
    return recalls | {"mean_rank": before + wrong / (right + 1) + 1}


def _hit(places: Tensor, wrong: Tensor, right: Tensor) -> Tensor:
    """Chance that a right item is among the first `places` of wrong + right shuffled ones.

    1 - C(wrong, places) / C(wrong + right, places): all of the first are wrong.
    """
    drawn = torch.minimum(places.clamp(min=0), wrong)
    log_miss = (
        torch.lgamma(wrong + 1)
        - torch.lgamma(wrong - drawn + 1)
        - torch.lgamma(wrong + right + 1)
        + torch.lgamma(wrong + right - drawn + 1)
    )
    miss = torch.where(places > 0, log_miss.exp(), 1.0)
    return torch.where(places > wrong, 1.0, 1 - miss)
