"""The three objectives; each returns an unweighted `Term`."""

MEMBERS = {
    "global_semantic": "global_semantic.GlobalSemantic",
    "masked_text": "masked_text.MaskedText",
    "relationship": "relationship.Relationship",
}
