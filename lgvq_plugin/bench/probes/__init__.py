"""Downstream tasks on frozen codes, the same for any tokenizer."""

MEMBERS = {
    "retrieval": "retrieval.RetrievalProbe",
    "attributes": "attributes.AttributesProbe",
    "masked_words": "masked_words.MaskedWordsProbe",
    "captioning": "captioning.CaptioningProbe",
    "questions": "vqa.QuestionsProbe",
    "text_to_image": "text_to_image.TextToImageProbe",
    "image_judge": "image_judge.ImageJudge",
}
