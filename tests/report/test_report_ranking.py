"""Response ranking against every pair, one by one."""

import numpy as np
import pytest

from vitask_plugin.report.ranking import response_ranking


def brute_force(likelihoods: np.ndarray, labels: np.ndarray) -> tuple[float, float, float]:
    """Mean of positive and negative log-likelihoods, and the share ranked right, over images and their negatives."""
    positive, negative, ranked = [], [], []
    for image, label in enumerate(labels):
        own = likelihoods[image, label]
        others = [likelihoods[other, label] for other in range(len(labels)) if labels[other] != label]
        positive.append(own)
        negative.append(np.mean(others))
        ranked.append(np.mean([1.0 if own > value else 0.5 if own == value else 0.0 for value in others]))
    return float(np.mean(positive)), float(np.mean(negative)), float(np.mean(ranked))


@pytest.mark.parametrize("decimals", [12, 0])  # 0: many ties
def test_pairs_are_weighted_as_drawing_would(decimals: int) -> None:
    generator = np.random.default_rng(0)
    labels = generator.choice(4, 90, p=[0.6, 0.25, 0.1, 0.05])
    likelihoods = generator.normal(-3, 1, (90, 4)) - np.array([0.0, 1.0, 4.0, 2.0])
    likelihoods[np.arange(90), labels] += 1.0
    likelihoods = likelihoods.round(decimals)
    found = response_ranking(likelihoods, np.eye(4, dtype=bool)[labels])
    positive, negative, ranked = brute_force(likelihoods, labels)
    assert found.ranked == pytest.approx(ranked, abs=1e-12)
    step = found.grid[1] - found.grid[0]
    for density, mean in ((found.positive, positive), (found.negative, negative)):
        assert density.sum() * step == pytest.approx(1)
        # The kernels are symmetric; the grid leaves out half a percent on either side.
        assert (density * found.grid).sum() * step == pytest.approx(mean, abs=0.06)
    assert found.images == 90


def test_overlap_of_known_densities() -> None:
    """Two normal densities 2 deviations apart share 2 Phi(-1) = 0.3173."""
    generator = np.random.default_rng(0)
    labels = np.arange(20000) % 2
    likelihoods = generator.normal(0, 1, (20000, 2))
    likelihoods[np.arange(20000), labels] += 2
    found = response_ranking(likelihoods, np.eye(2, dtype=bool)[labels])
    assert found.overlap == pytest.approx(0.3173, abs=0.02)
    # Phi(2 / sqrt(2))
    assert found.ranked == pytest.approx(0.9214, abs=0.005)


def test_a_model_that_ignores_the_image_and_one_that_knows_it() -> None:
    labels = np.arange(60) % 3
    members = np.eye(3, dtype=bool)[labels]
    blind = response_ranking(np.tile([-1.0, -5.0, -2.0], (60, 1)), members)
    assert blind.overlap == pytest.approx(1) and blind.ranked == 0.5
    knowing = response_ranking(np.where(members, -0.01, -9.0), members)
    assert knowing.overlap == pytest.approx(0, abs=1e-6) and knowing.ranked == 1


def test_labels_of_all_or_no_images_have_no_pairs() -> None:
    likelihoods = np.array([[-1.0, -2.0, -3.0], [-2.0, -1.0, -3.0]])
    members = np.array([[True, True, False], [False, True, False]])
    found = response_ranking(likelihoods, members)
    assert found.images == 1 and found.ranked == 1
    assert response_ranking(likelihoods, np.array([[True, False, True]] * 2)) is None
    assert response_ranking(np.full((2, 3), np.nan), members) is None
