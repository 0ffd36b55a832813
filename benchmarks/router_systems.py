"""Other ways to route, to compare with: each learns from token ids or features and answers classes."""

from collections.abc import Callable, Sequence

import torch
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import RidgeClassifier
from sklearn.naive_bayes import MultinomialNB
from torch import Tensor

Predict = Callable[[Sequence[Sequence[int]], Tensor], Tensor]


def _same(row: Sequence[int]) -> Sequence[int]:
    return row


def systems(rows: Sequence[Sequence[int]], features: Tensor, truth: Tensor) -> dict[str, Predict]:
    """By name, what each makes of new token ids and features.

    tf-idf + ridge: single tokens, sublinear counts. likelihood ratio: a smoothed unigram model of
    tokens per expert. The others see `features` (mean embeddings).
    """
    tfidf = TfidfVectorizer(analyzer=_same, sublinear_tf=True)
    ridge = RidgeClassifier().fit(tfidf.fit_transform(rows), truth.numpy())
    counts = CountVectorizer(analyzer=_same)
    bayes = MultinomialNB(alpha=0.1, fit_prior=False).fit(counts.fit_transform(rows), truth.numpy())
    centroids = torch.stack([features[truth == c].mean(dim=0) for c in truth.unique()])

    def neighbours(new: Tensor) -> Tensor:
        nearest = torch.cdist(new, features).topk(5, largest=False).indices
        return truth[nearest].mode(dim=1).values

    return {
        "tf-idf + ridge": lambda r, _: torch.from_numpy(ridge.predict(tfidf.transform(r))),
        "unigram likelihood ratio": lambda r, _: torch.from_numpy(
            bayes.predict(counts.transform(r))
        ),
        "nearest centroid": lambda _, x: torch.cdist(x, centroids).argmin(dim=1),
        "5 nearest neighbours": lambda _, x: neighbours(x),
    }
