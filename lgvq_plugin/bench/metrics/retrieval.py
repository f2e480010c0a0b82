"""Recall at k from a matrix of similarities."""

from collections.abc import Sequence

import torch
from torch import Tensor


def retrieval_recall(
    similarity: Tensor, relevant: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Return the means of :func:`retrieval_by_query`; same arguments.

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
    """Return whether a relevant item is among the k nearest of each query, and its rank.

    Ties are resolved in expectation over random orders, so features without information give
    chance level and not 1. `similarity` of Q queries to G items and `relevant`, bool, are (Q, G);
    larger is nearer, and of several relevant items per query the nearest counts. Returns `recall@k`
    for each k, in [0, 1], and `mean_rank`, starting from 1; each (Q,) float64.

    Raises:
        ValueError: on unequal shapes, nan, or a query without a relevant item.
    """
    if similarity.ndim != 2 or similarity.shape != relevant.shape or not len(similarity):
        raise ValueError(
            f"expected two (Q, G) of one shape, Q >= 1, got {tuple(similarity.shape)} and "
            f"{tuple(relevant.shape)}"
        )
    if similarity.isnan().any():
        raise ValueError("similarity has nan")
    relevant = relevant.bool()
    if not relevant.any(dim=1).all():
        raise ValueError("some query has no right item; leave it out")
    best = similarity.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)
    before = ((similarity > best) & ~relevant).sum(dim=1).double()
    wrong = ((similarity == best) & ~relevant).sum(dim=1).double()
    right = ((similarity == best) & relevant).sum(dim=1).double()
    recalls = {f"recall@{k}": _hit_probability(k - before, wrong, right) for k in ks}
    # Of `wrong` items shuffled with `right` ones, wrong / (right + 1) precede the first right one.
    return recalls | {"mean_rank": before + wrong / (right + 1) + 1}


def _hit_probability(places: Tensor, wrong: Tensor, right: Tensor) -> Tensor:
    """Probability of a right item among the first `places` of wrong + right shuffled ones.

    1 - C(wrong, places) / C(wrong + right, places): not all of the first are wrong.
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
