"""Tensors in, numbers out."""

MEMBERS = {
    "reconstruction": "reconstruction.ReconstructionMetrics",
    "codebook": "codebook.CodebookUsage",
    "retrieval": "retrieval.retrieval_recall",
}
