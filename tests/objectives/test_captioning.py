"""The caption objective against plain loops, the published case, and broken variants."""

from types import SimpleNamespace

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.models import TokenShape, build_dual_encoder
from dist_siglip.objectives import Captioning, CaptionWriting, Objective, Rows, uniform
from dist_siglip.objectives import captioning as captioning_module
from tests.support import reference_captioning as reference
from tests.support.tiny_models import ARCHITECTURES, write_config

WRITING = CaptionWriting(prefix=(), end_id=1, pad_id=0)
LOGITS = torch.tensor(
    [[[0, 0, 2, 0], [0, 1, 0, 0], [5, 0, 0, 0]], [[0, 0, 0, 1], [0, 0, 0, 0], [0, 3, 0, 0]]],
    dtype=torch.float64,
)
LABELS = torch.tensor([[2, 1, 0], [3, 2, 1]])


def rows_of(texts, tokens=None, valid=None):
    count = len(texts)
    tokens = torch.zeros(count, 2, 3) if tokens is None else tokens
    valid = torch.ones(count, dtype=torch.bool) if valid is None else valid
    return Rows(tokens, texts, torch.arange(count), valid)


def of_logits(logits):
    """The objective with a decoder that gives these logits, (B, L, V)."""
    objective = Captioning(parallel=0.0)
    objective.writing = WRITING
    objective.decoder = lambda rows, starts, tokens, *masks: logits
    objective.output = torch.nn.Linear(4, 4).double()
    torch.nn.init.eye_(objective.output.weight)
    torch.nn.init.zeros_(objective.output.bias)
    return objective


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    return build_dual_encoder(write_config(path, ARCHITECTURES["siglip"]))


@pytest.fixture
def captioning(built):
    torch.manual_seed(1)
    objective = Captioning(parallel=0.5, layers=2)
    objective.build(built, TokenShape(4, 6))
    for parameter in objective.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return objective.double()


def captions(num_captions=5):
    """Rows of CLIP's tokens of several lengths."""
    torch.manual_seed(2)
    texts = torch.randint(1, 40000, (num_captions, 8))
    texts[:, 0] = 49406
    for row in range(num_captions):
        end = 2 + row % 6
        texts[row, end], texts[row, end + 1 :] = 49407, 0
    return texts


def test_the_published_case():
    logits = LOGITS.clone().requires_grad_()
    (term,) = of_logits(logits)(rows_of(LABELS)).values()
    loss = term.total / term.number
    assert loss.item() == pytest.approx(0.649300, abs=1e-6)
    is_target = WRITING.is_target(LABELS)
    assert is_target.tolist() == [[True, True, False], [True, True, True]]
    expected = reference.caption_loss(LOGITS.tolist(), LABELS.tolist(), is_target.tolist())
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    (slope,) = torch.autograd.grad(loss, logits)
    assert slope[0, 0].tolist() == pytest.approx(
        [0.024064, 0.024064, -0.072191, 0.024064], abs=1e-6
    )
    assert not slope[0, 2].any()


@pytest.mark.parametrize(
    ("broken", "value"),
    [
        (lambda losses, targets: losses.mean(), 0.562267),  # padding counts
        (lambda losses, targets: losses[targets].mean(), 0.670718),  # the mean over tokens
    ],
)
def test_the_case_rejects_padding_that_counts_and_the_mean_over_tokens(broken, value):
    losses = torch.tensor(
        [
            [reference.cross_entropy(row, label) for row, label in zip(rows, labels, strict=True)]
            for rows, labels in zip(LOGITS.tolist(), LABELS.tolist(), strict=True)
        ]
    )
    found = broken(losses, WRITING.is_target(LABELS)).item()
    assert found == pytest.approx(value, abs=1e-6)
    assert abs(found - 0.649300) > 0.02


def test_rows_that_are_not_valid_or_have_no_target_do_not_count():
    objective = of_logits(LOGITS)
    (term,) = objective(rows_of(LABELS, valid=torch.tensor([True, False]))).values()
    assert term.number.item() == 1
    assert term.total.item() == pytest.approx(0.542211, abs=1e-6)
    (term,) = objective(rows_of(torch.tensor([[0, 0, 0], [3, 2, 1]]))).values()
    assert term.number.item() == 1
    assert term.total.item() == pytest.approx(0.756390, abs=1e-6)


def test_the_decoder_is_that_of_plain_loops(captioning):
    texts, tokens = captions(), torch.randn(5, 4, 6, dtype=torch.float64)
    rows = rows_of(texts, tokens)
    is_parallel = uniform(rows.draws, 0) < 0.5
    assert 0 < is_parallel.sum() < 5
    (term,) = captioning(rows).values()
    state = {name: value.detach() for name, value in captioning.state_dict().items()}
    mask_id = captioning.decoder.mask_id
    logits = reference.decode(state, texts, tokens, is_parallel, heads=2, mask_id=mask_id)
    targets = captioning.writing.is_target(texts)
    expected = reference.caption_loss(logits, texts.tolist(), targets.tolist())
    assert term.total.item() / 5 == pytest.approx(expected, rel=1e-10)
    # The loss depends on the prediction mode: a decoder that ignored it would be noticed.
    causal = reference.decode(state, texts, tokens, torch.zeros(5).bool(), heads=2, mask_id=mask_id)
    other = reference.caption_loss(causal, texts.tolist(), targets.tolist())
    assert abs(other - expected) > 1e-3


def test_a_position_sees_the_tokens_before_it_and_in_parallel_none(captioning):
    texts = captions()
    tokens = torch.randn(5, 4, 6, dtype=torch.float64)
    for parallel in (False, True):
        mode = torch.full((5,), parallel)
        hidden = captioning.decoder([texts], [0], tokens, mode)
        for place in range(texts.shape[1]):
            changed = texts.clone()
            changed[:, place:] = 7
            other = captioning.decoder([changed], [0], tokens, mode)
            assert torch.equal(other[:, : place + 1], hidden[:, : place + 1])
            seen = other[:, place + 1 :].ne(hidden[:, place + 1 :]).any().item()
            assert seen == (not parallel and place + 1 < texts.shape[1])
        assert not torch.allclose(
            captioning.decoder([texts], [0], tokens.flip(1) * 2, mode), hidden
        )


def test_the_first_loss_is_the_logarithm_of_the_vocabulary(built):
    objective = Captioning()
    objective.build(built, TokenShape(4, 6))
    (term,) = objective(rows_of(captions(), torch.randn(5, 4, 6))).values()
    assert (term.total / term.number).item() == pytest.approx(10.80787, abs=1e-4)  # ln 49408


def test_sizes_are_those_of_the_text_tower_and_half_its_layers(built):
    objective = Captioning()
    objective.build(built, TokenShape(4, 6))
    decoder = objective.decoder
    assert decoder.embedding.weight.shape == (49409, 16)
    assert decoder.positions.shape == (8, 16)
    assert len(decoder.blocks) == 1  # of one: half, rounded up
    assert decoder.blocks[0].mlp[1].weight.shape == (64, 16)
    assert decoder.blocks[0].self_attention.heads == 2
    assert decoder.blocks[0].cross_attention.key_value.in_features == 6
    asked = Captioning(layers=3, width=24, heads=3)
    asked.build(built, TokenShape(4, 6))
    assert len(asked.decoder.blocks) == 3
    assert asked.output.weight.shape == (49408, 24)
    assert asked.decoder.blocks[0].mlp[1].out_features == 96


def test_measures_tell_a_decoder_that_looks_from_one_that_does_not(captioning):
    texts, tokens = captions(), torch.randn(5, 4, 6, dtype=torch.float64)
    found = captioning.measure(rows_of(texts, tokens))
    means = {name: (term.total / term.number).item() for name, term in found.items()}
    assert abs(means["caption_picture_gain"]) > 1e-3
    for block in captioning.decoder.blocks:
        torch.nn.init.zeros_(block.cross_attention.out.weight)
    found = captioning.measure(rows_of(texts, tokens))
    assert found["caption_picture_gain"].total.item() == pytest.approx(0, abs=1e-12)
    alone = captioning.measure(rows_of(texts[:1], tokens[:1]))
    assert alone["caption_picture_gain"].number.item() == 0
    right = torch.zeros(5, 8, 49408, dtype=torch.float64)
    right.scatter_(2, texts[..., None], 9.0)
    right[0, 1] = 0  # one of the two targets of the first caption
    captioning._losses = lambda *_: {"caption": (right.sum(2), right.argmax(2))}
    accuracy = captioning.measure(rows_of(texts, tokens))["caption_token_accuracy"]
    assert (accuracy.total / accuracy.number).item() == pytest.approx((0.5 + 4) / 5)


def test_it_learns_to_write_captions_of_pictures(monkeypatch):
    """Four pictures, four captions; what it writes is them, by the patches alone."""
    sizes = {"width": 32, "heads": 4, "layers": 2, "vocab_size": 12, "mlp_width": 64}
    monkeypatch.setattr(captioning_module, "_text_sizes", lambda built: sizes)
    small = SimpleNamespace(
        tokenizer=lambda texts: torch.tensor([[10, 11, *[0] * 6]]), context_length=8
    )
    torch.manual_seed(3)
    objective = Captioning(parallel=0.25)
    objective.build(small, TokenShape(4, 6))
    captions = [[10, 3, 11], [10, 4, 4, 5, 6, 11], [10, 3, 7, 11], [10, 8, 9, 8, 3, 4, 5, 11]]
    texts = torch.tensor([[*caption, *[0] * (8 - len(caption))] for caption in captions])
    tokens = torch.randn(4, 4, 6)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0.01)
    for step in range(150):
        rows = rows_of(texts, tokens)._replace(draws=torch.arange(4) + 1000 * step)
        (term,) = objective(rows).values()
        optimizer.zero_grad()
        (term.total / term.number).backward()
        optimizer.step()
    written = objective.write(tokens)
    is_target = objective.writing.is_target(written)
    assert is_target.equal(objective.writing.is_target(texts))
    assert written[is_target].equal(texts[is_target])
    # With another's patches it writes another's caption.
    swapped = objective.write(tokens[[1, 0, 3, 2]])
    assert swapped[0, :6].tolist() == captions[1]


def test_tokens_become_text_again(built):
    texts = built.tokenizer(["two grey foxes", ""])
    assert built.tokenizer.decode(texts[0].tolist()) == "two grey foxes !!!"  # padding is a token
    writing = CaptionWriting.of(built.tokenizer)
    assert writing == CaptionWriting(prefix=(49406,), end_id=49407, pad_id=0)
    wanted = [
        built.tokenizer.decode(row[mask].tolist())
        for row, mask in zip(texts, writing.is_target(texts), strict=True)
    ]
    assert wanted == ["two grey foxes", ""]


def test_the_share_in_parallel_is_a_function_of_the_draws():
    draws = torch.randint(2**62, (4000,))
    found = uniform(draws, 0)
    assert found.min() >= 0
    assert found.max() < 1
    assert found.mean().item() == pytest.approx(0.5, abs=0.03)
    assert uniform(draws[7:8], 0) == found[7]
    counted = uniform(torch.arange(4000), 0)  # neighbours have nothing to do with each other
    assert counted.mean().item() == pytest.approx(0.5, abs=0.03)
    both = torch.stack([found, uniform(draws, 1)])
    assert abs(torch.corrcoef(both)[0, 1].item()) < 0.06
    # Words of SplitMix64 from state 0, upper 24 bits (Vigna's splitmix64.c).
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    expected = [(word >> 40) / 2**24 for word in first]
    assert [uniform(torch.tensor([0]), stream).item() for stream in range(3)] == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight": -1.0}, r"weight \(-1.0\) of Captioning must be 0 or above"),
        ({"start": float("nan")}, r"start \(nan\) of Captioning"),
        ({"ramp_steps": -1}, r"ramp_steps \(-1\) of Captioning"),
        ({"parallel": 1.5}, r"parallel \(1.5\) of Captioning must be in \[0, 1\]"),
        ({"layers": 0}, r"layers \(0\) of Captioning must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        Captioning(**settings)


def test_what_does_not_fit_is_refused(built):
    with pytest.raises(UserError, match=r"width \(16\) of Captioning must be a multiple of heads"):
        Captioning(heads=3).build(built, TokenShape(4, 6))
    with pytest.raises(UserError, match="pads captions on the left"):
        CaptionWriting.of(lambda texts: torch.tensor([[0, 0, 0, 0, 1]]))
    with pytest.raises(UserError, match=r"share of trainer.max_steps \(-1\)"):
        Objective(start=0.5).weight_at(0, -1)


def test_weights_begin_and_rise_by_steps_or_shares():
    assert [Objective(start=3, ramp_steps=2).weight_at(step, 5) for step in range(6)] == [
        *(0, 0, 0),
        *(0.5, 1, 1),
    ]
    assert Objective(2.0).weight_at(0, 1) == 2.0
    assert Objective(1.0, start=0.8).weight_at(79, 100) == 0
    assert Objective(1.0, start=0.8).weight_at(80, 100) == 1
