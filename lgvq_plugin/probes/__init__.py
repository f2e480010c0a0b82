"""Downstream tasks on frozen codes, the same for any tokenizer."""

MEMBERS = {
    "retrieval": "retrieval.RetrievalProbe",
    "attributes": "attributes.AttributesProbe",
}
