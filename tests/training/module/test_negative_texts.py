"""Texts without a picture, and mined ones: read from shards, and trained with on any ranks."""

import json
import math
import warnings
from functools import partial

import pytest
import torch

from dist_siglip.data import ImageTextBatch
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.errors import UserError
from dist_siglip.losses import ClipLoss, MatryoshkaLoss, SigLipLoss, siglip_loss
from dist_siglip.objectives import Captioning
from dist_siglip.training.datamodule import ImageTextDataModule
from dist_siglip.training.module.calibration import warn_of_mining
from dist_siglip.training.module.captions import num_negatives_of
from dist_siglip.training.strategies import FullyShardedStrategy
from tests.support.processes import run_ranks
from tests.support.sharded_ranks import worst_error
from tests.support.shards import caption, encode, picture, tiny_inputs, write_shard
from tests.support.teacher_ranks import Watch
from tests.support.tiny_models import ARCHITECTURES, write_config
from tests.support.tuning_ranks import fit, locked_module

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*"),
    pytest.mark.filterwarnings("ignore:.*overrides the configure_model"),
]

PAIRS, NEGATIVES = 6, 2
RULE = CaptionRule(members=("txt", "json"), negatives="swapped", num_negatives=NEGATIVES)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("model") / "tiny.json", ARCHITECTURES["siglip"])


def swapped(number):
    """Sample 0 has none, 1 its own caption, 2 one, the others three."""
    own = [caption(1)] if number == 1 else [f"text {number} {each}" for each in "abc"]
    return {} if number == 0 else {"swapped": own[:1] if number == 2 else own}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    members = []
    for number in range(8):
        fields = {"png": encode(picture(number)), "txt": caption(number).encode()}
        members.append((f"{number:06d}", fields | {"json": json.dumps(swapped(number)).encode()}))
    return str(write_shard(tmp_path_factory.mktemp("shards") / "00000.tar", members))


def data_of(shards, rule=RULE, **settings):
    given = {"train_shards": shards, "global_batch_size": 8, "workers_per_rank": 0}
    given |= {"inputs": tiny_inputs(), "captions": rule}
    data = ImageTextDataModule(**given | settings)
    data.setup("fit")
    return data


def test_batches_bring_the_texts_of_the_field_but_no_captions_and_no_blanks(shards):
    data = data_of(shards)
    batch = next(iter(data.train_dataloader()))
    again = next(iter(data_of(shards).train_dataloader()))
    assert torch.equal(batch.negative_texts, again.negative_texts)
    tokenizer = data.inputs.tokenizer
    wanted = {0: 0, 1: 0, 2: 1}
    for row, number in enumerate(batch.sample_ids.tolist()):
        exist = batch.negatives_exist[row]
        assert int(exist.sum()) == wanted.get(number, 2)
        texts = tokenizer([*swapped(number).get("swapped", []), ""]).long()
        found = batch.negative_texts[row][exist]
        assert all((texts[:-1] == each).all(dim=1).any() for each in found)
        assert len(found.unique(dim=0)) == len(found)
    rows = batch.all_texts()
    assert torch.equal(rows[:8], batch.texts)
    assert torch.equal(rows[8:].view(batch.negative_texts.shape), batch.negative_texts)
    other = next(iter(data_of(shards, seed=1).train_dataloader()))
    ours, theirs = (
        dict(zip(each.sample_ids.tolist(), each.negative_texts.tolist(), strict=True))
        for each in (batch, other)
    )
    assert ours != theirs


def test_evaluations_see_none(shards):
    data = data_of(shards, val_shards=shards)
    assert next(iter(data.val_dataloader())).negative_texts is None
    assert next(iter(data_of(shards, CaptionRule()).train_dataloader())).negative_texts is None


def batches_of(rank=0, world_size=1):
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(3):
        images = torch.randint(256, (PAIRS, 3, 32, 32), generator=generator).byte()
        texts = torch.randint(1, 40000, (PAIRS, 1 + NEGATIVES, 8), generator=generator)
        texts[:, :, -1] = 49407
        exist = torch.tensor([[1, 1], [0, 0], [1, 0], [1, 1], [0, 0], [0, 0]]).bool()
        ids = torch.arange(PAIRS)
        whole = ImageTextBatch(
            images,
            texts[:, 0],
            ids,
            ids,
            ids >= 0,
            ids < 0,
            negative_texts=texts[:, 1:],
            negatives_exist=exist,
        )
        rows = slice(rank * PAIRS // world_size, (rank + 1) * PAIRS // world_size)
        found.append(ImageTextBatch(*(None if part is None else part[rows] for part in whole)))
    return found


MINING = partial(SigLipLoss, duplicates="positive", mined_negatives=2, mined_weight=3.0)
CASES = [
    {"loss": MINING},
    {"loss": MINING, "micro": 2},
    {"loss": SigLipLoss},
    {"loss": ClipLoss},
    {"loss": SigLipLoss, "micro": 2},
    {"loss": SigLipLoss, "micro": 2, "has_objective": True},
    {"loss": SigLipLoss, "micro": 1, "sharded": True},
]


def module_of(model, case):
    objectives = [Captioning(layers=1)] if case.get("has_objective") else None
    return locked_module(
        model, loss=case["loss"](), micro_batch_size=case.get("micro"), objectives=objectives
    )


def train(model, folder, case, rank=0, world_size=1):
    warnings.simplefilter("ignore")
    module = module_of(model, case)
    watch = Watch()
    is_sharded = case.get("sharded") and world_size > 1
    options = {"strategy": FullyShardedStrategy()} if is_sharded else {}
    batches = batches_of(rank, world_size)
    fit(module, folder, batches, rank, world_size, callbacks=[watch], **options)
    state = {}
    for name, value in module.state_dict().items():
        state[name] = value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
    return state, watch.logged


def train_rank(rank, world_size, model, folder, cases):
    return [train(model, folder, case, rank, world_size) for case in cases]


@pytest.mark.e2e
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_wrapped_or_sharded_train_as_one(model, tmp_path, world_size):
    expected = [train(model, tmp_path, case) for case in CASES]
    found = run_ranks(train_rank, world_size, model, str(tmp_path), CASES)
    for number, (whole, logged) in enumerate(expected):
        start = module_of(model, CASES[number]).state_dict()
        assert worst_error(found[0][number][0], whole, start) < 1e-4, CASES[number]
        for ours, theirs in zip(found[0][number][1], logged, strict=True):
            assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)


def test_a_step_has_the_loss_of_all_texts_that_exist(model, tmp_path):
    logged = train(model, tmp_path, CASES[2])[1]
    module, batch = locked_module(model), batches_of()[0]
    with torch.no_grad():
        image, text = module.towers(batch.images, batch.texts)
        negative = module.towers.encode_text(batch.negative_texts[batch.negatives_exist])
        loss = siglip_loss(image, text, *module.logits(), negative_text_features=negative)
    assert len(negative) == 5
    assert logged[0]["train/loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_calibration_counts_them_and_a_run_without_it_says_how_far_the_bias_is(
    model, shards, tmp_path, caplog
):
    module = locked_module(model, global_batch_size=6)
    torch.manual_seed(0)
    rows = [torch.nn.functional.normalize(torch.randn(40, 8), dim=1) for _ in range(2)]
    rows[1] = torch.nn.functional.normalize(rows[0] + 0.4 * rows[1], dim=1)
    ids = torch.arange(40)
    with_none = module.calibrate(*rows, ids)
    module.num_negatives = NEGATIVES
    with_some = module.calibrate(*rows, ids)
    expected = locked_module(model, global_batch_size=18).calibrate(*rows, ids)
    assert (with_some.scale, with_some.bias) == (
        expected.scale,
        expected.bias,
    )
    assert with_some.bias < with_none.bias
    fit(module, tmp_path, batches_of())
    assert f"the best bias is about {-math.log(3):+.1f} away" in caplog.text


def test_micro_batches_leave_mining_as_it_is_and_a_run_says_what_it_does_to_the_bias(
    model, tmp_path, caplog
):
    (whole, logged), (in_parts, of_parts) = (train(model, tmp_path, case) for case in CASES[:2])
    assert worst_error(in_parts, whole, module_of(model, CASES[0]).state_dict()) < 1e-4
    for ours, theirs in zip(of_parts, logged, strict=True):
        assert ours["train/mined_loss"] == pytest.approx(theirs["train/mined_loss"], rel=1e-4)
        both = theirs["train/mined_loss"] + theirs["train/base_loss"]
        assert theirs["train/loss"] == pytest.approx(both, rel=1e-5)
    assert "mined_negatives (2): the hardest negatives count 4 times" in caplog.text
    assert f"the best bias is up to {math.log(4):.1f} lower" in caplog.text
    assert "without duplicates" not in caplog.text
    warn_of_mining(SigLipLoss(mined_negatives=2), is_calibrated=True)
    assert "mined_negatives (2) without duplicates: a picture's caption that" in caplog.text


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"negatives": "txt"}, r"captions.negatives \('txt'\) must name a field of a JSON member"),
        ({"negatives": ""}, r"captions.negatives \(''\) must name a field of a JSON member"),
        ({"members": ("txt",)}, r"JSON member that captions.members \(\['txt'\]\) has"),
        ({"num_negatives": 0}, r"captions.num_negatives \(0\) must be at least 1"),
        ({"weights": {"swapped": 1.0}}, r"\(swapped\) names captions, too"),
    ],
)
def test_rules_that_cannot_be_are_refused_in_one_line(rule, words):
    given = {"members": ("txt", "json"), "negatives": "swapped", **rule}
    with pytest.raises(UserError, match=words) as caught:
        CaptionRule(**given).check()
    assert "\n" not in str(caught.value)


def test_losses_and_data_that_do_not_go_with_them_are_refused(shards):
    class Data:
        captions = RULE

        class features:  # noqa: N801 - stands in for an attribute
            towers = ("text",)

    assert num_negatives_of(object(), SigLipLoss()) == 0
    with pytest.raises(UserError, match="train_features stand in for the text tower"):
        num_negatives_of(Data, SigLipLoss())
    with pytest.raises(UserError, match=r"loss \(MatryoshkaLoss\) takes no texts without"):
        num_negatives_of(Data, MatryoshkaLoss([8, 4]))
    with pytest.raises(UserError, match="this module takes no texts without a picture"):
        num_negatives_of(Data, None)
    data = data_of(shards, CaptionRule(members=("txt", "json"), negatives="nowhere"))
    with pytest.raises(UserError, match=r"none of the next .* has field 'nowhere'"):
        data.train_dataloader()
