"""Retrieval recall as an `evaluate.Metric`, for pipelines built on that library."""

import datasets
import evaluate
import numpy as np
import torch

from clipmap_hf.evaluation.retrieval import recall_at_k


__all__ = ["RetrievalRecall"]


class RetrievalRecall(evaluate.Metric):
    """
    Computes `recall_at_k` over examples that are added one by one or in batches. An example is a normalized image
    embedding, a normalized text embedding and the id of the image. An image with several captions is therefore added
    once per caption.

    ```python
    metric = RetrievalRecall()
    metric.add_batch(image_embeds=image_embeds, text_embeds=text_embeds, image_ids=image_ids)
    metric.compute(ks=[1, 5, 10])  # {"image_to_text_recall@1": …}
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Recall@k of image-to-text and text-to-image retrieval.",
            citation="",
            inputs_description=self.__class__.__doc__,
            features=datasets.Features(
                {
                    "image_embeds": datasets.List(datasets.Value("float32")),
                    "text_embeds": datasets.List(datasets.Value("float32")),
                    "image_ids": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, image_embeds, text_embeds, image_ids, ks=(1, 5, 10)) -> dict[str, float]:
        _, first, image_of_text = np.unique(np.asarray(image_ids), return_index=True, return_inverse=True)
        return recall_at_k(
            torch.tensor(np.asarray(image_embeds))[torch.from_numpy(first)],
            torch.tensor(np.asarray(text_embeds)),
            torch.from_numpy(image_of_text),
            ks=ks,
        )
