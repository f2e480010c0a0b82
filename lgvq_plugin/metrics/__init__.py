"""Tensors in, numbers out."""

MEMBERS = {
    "reconstruction": "reconstruction.ReconstructionMetrics",
    "lpips": "perceptual.PerceptualDistance",
    "frechet": "frechet.FrechetDistance",
    "codebook": "codebook.CodebookUsage",
    "nearest_codes": "code_geometry.nearest_code_distances",
    "similarity_gap": "code_geometry.similarity_gap",
    "retrieval": "retrieval.retrieval_recall",
    "captions": "captions.caption_scores",
    "answers": "answers.exact_accuracy",
    "votes": "answers.vote_accuracy",
    "wups": "answers.wups",
}
