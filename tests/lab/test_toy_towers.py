"""Two small encoders on the same samples."""

import torch

from dist_siglip.lab.toy_towers import Toy, train_toy
from dist_siglip.losses import LogitScaleBias, SigLipLoss
from dist_siglip.metrics import recall_at_k, retrieval_ranks


def _recall(trained):
    ids = torch.arange(len(trained.image_features))
    features = trained.image_features, trained.text_features
    return recall_at_k(retrieval_ranks(*features, ids, ids), 1)


def test_training_finds_the_pairs_it_was_shown():
    toy = Toy(num_samples=32, batch_size=16, steps=150)
    trained = train_toy(toy, SigLipLoss(), LogitScaleBias())
    assert _recall(trained) == 1.0
    assert trained.image_features.norm(dim=1).allclose(torch.ones(32))


def test_it_finds_pairs_it_has_not_seen_through_noise():
    toy = Toy(num_samples=0, noise=0.5, steps=150)
    assert _recall(train_toy(toy, SigLipLoss(), LogitScaleBias(), num_unseen=50)) > 0.3


def test_the_same_seed_gives_the_same_towers_whatever_was_drawn_before():
    toy = Toy(num_samples=16, batch_size=8, steps=2)
    first = train_toy(toy, SigLipLoss(), LogitScaleBias())
    torch.randn(7)
    assert train_toy(toy, SigLipLoss(), LogitScaleBias()).first_loss == first.first_loss


def test_unseen_samples_are_the_same_after_more_steps():
    """Their number does not depend on how long training draws from the same generator."""
    short, longer = (
        train_toy(
            Toy(num_samples=0, batch_size=8, steps=steps, learning_rate=0.0),
            SigLipLoss(),
            LogitScaleBias(train_scale=False, train_bias=False),
            num_unseen=5,
        )
        for steps in (1, 3)
    )
    assert torch.equal(short.image_features, longer.image_features)
