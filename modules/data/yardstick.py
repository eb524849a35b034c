"""What a finetuned classifier should beat: TF-IDF and logistic regression, of scikit-learn, on the same texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def has_scikit_learn() -> bool:
    """Whether scikit-learn, an optional dependency (``lightning-qlora[yardstick]``), is installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        return False
    return True


def tfidf_logistic_regression(
    texts: Sequence[str], targets: Sequence[int], new_texts: Sequence[str], num_labels: int
) -> Tensor:
    """Logarithms of the probabilities of ``new_texts``, float32 [N, C], after training on ``texts`` in full length.

    Words with sublinear term frequencies; L2 penalty with C = 10. Takes seconds.

    Args:
        texts: To train on.
        targets: The class of each, in [0, C).
        new_texts: N texts.
        num_labels: C. A class without a training text gets minus infinity.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectors = TfidfVectorizer(sublinear_tf=True)
    regression = LogisticRegression(C=10.0, max_iter=1000)
    regression.fit(vectors.fit_transform(texts), targets)
    found = torch.full((len(new_texts), num_labels), -torch.inf)
    logs = regression.predict_log_proba(vectors.transform(new_texts))
    found[:, torch.from_numpy(regression.classes_)] = torch.from_numpy(logs).float()
    return found
