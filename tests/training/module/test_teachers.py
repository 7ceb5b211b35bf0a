"""Teachers of a training: what they see and say, and that they are no part of what trains."""

import math
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.data import ImageTextBatch
from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.data.samples.datacompdr import DataCompDR
from dist_siglip.errors import UserError
from dist_siglip.evaluation.embed import EmbedSettings, embed_shards
from dist_siglip.losses import DistillationLoss, WeightedLoss, siglip_loss
from dist_siglip.losses.distillation import distillation_loss
from dist_siglip.models import build_dual_encoder
from dist_siglip.models.tuning import TowerConfig
from dist_siglip.training.callbacks import WeightAverage
from dist_siglip.training.datamodule import ImageTextDataModule
from dist_siglip.training.module import SigLipModule
from dist_siglip.training.module.teachers import TeacherConfig
from tests.support.devices import on_devices
from tests.support.hugging_face import write_folder
from tests.support.processes import run_ranks
from tests.support.sharded_ranks import worst_error
from tests.support.shards import caption, encode, picture, write_shard
from tests.support.teacher_ranks import LARGER, batches_of, train, train_rank, write_teacher
from tests.support.tiny_models import ARCHITECTURES, write_config
from tests.support.tuning_ranks import locked_module

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:.*overrides the configure_model"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("model") / "tiny.json", ARCHITECTURES["siglip"])


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """One of the student's size and tokens, and one of others."""
    folder = tmp_path_factory.mktemp("teachers")
    return [
        write_teacher(folder, "alike", ARCHITECTURES["clip"]),
        write_teacher(folder, "larger", LARGER, logits=(30.0, -9.0)),
    ]


@pytest.fixture(scope="module")
def clip_teacher(tmp_path_factory):
    """Without a bias, as of a softmax loss."""
    folder = tmp_path_factory.mktemp("clip")
    return write_teacher(folder, "clip", ARCHITECTURES["clip"], logits=(100.0, None))


def module_of(model, teachers, loss=None, **settings):
    return locked_module(
        model,
        loss=DistillationLoss() if loss is None else loss,
        teachers=[TeacherConfig(**each) for each in teachers],
        **settings,
    )


def all_equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_each_teacher_sees_the_crop_at_its_size_and_the_caption_in_its_tokens(model, teachers):
    module = module_of(model, teachers)
    batch = batches_of(1)[0]
    found = module.teachers.features_of(batch, 3)
    assert (found.dims, found.biases) == ((8, 64), (-12.0, -9.0))
    assert found.scales == pytest.approx((20.0, 30.0), rel=1e-6)
    assert [each.context_length for each in module.inputs.teachers.tokenizers] == [6]
    pixels = batch.images.float()
    larger = F.interpolate(pixels, (48, 48), mode="bicubic", antialias=True)
    seen = ((pixels, batch.texts), (larger.round().clamp(0, 255), batch.texts[:, 2:]))
    start = 0
    for each, (images, texts) in zip(teachers, seen, strict=True):
        built = build_dual_encoder(**each)
        built.encoder.eval()
        mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (built.mean, built.std))
        with torch.no_grad():
            expected = built.encoder((images / 255 - mean) / std, texts)
        columns = slice(start, start + built.embed_dim)
        for ours, theirs in zip((found.image, found.text), expected, strict=True):
            assert torch.allclose(ours[:, columns], theirs, atol=1e-5)
        start = columns.stop


@on_devices
def test_each_device_hears_what_teachers_say(model, teachers, device):
    module = module_of(model, teachers)
    batch = batches_of(1)[0]
    expected = module.teachers.features_of(batch, None)
    there = ImageTextBatch(*(None if part is None else part.to(device) for part in batch))
    found = module.teachers.features_of(there, 3)
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert ours.device.type == device
        assert torch.allclose(ours.cpu(), theirs, atol=5e-3)  # convolutions in TF32


def test_a_folder_of_transformers_teaches_with_its_scale_bias_and_tokens(model, tmp_path):
    theirs = write_folder(tmp_path / "hf", "siglip")
    module = module_of(model, [{"model": f"local-dir:{tmp_path / 'hf'}"}])
    (tokenizer,) = module.inputs.teachers.tokenizers
    texts = tokenizer(["one two three", "nine ten", "five", "six seven eight"])
    batch = batches_of(1)[0]._replace(teacher_texts=texts)
    found = module.teachers.features_of(batch, None)
    assert (found.scales, found.biases) == (pytest.approx((math.exp(3.0),)), (-11.5,))
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.5, 0.4, 0.3)))
    with torch.no_grad():
        expected = theirs(input_ids=texts, pixel_values=(batch.images / 255 - mean) / std)
    assert torch.allclose(found.image, expected.image_embeds, atol=1e-5)
    assert torch.allclose(found.text, expected.text_embeds, atol=1e-5)


def test_a_step_weighs_base_and_distillation_and_logs_both(model, teachers, tmp_path):
    _, _, logged, _ = train(model, tmp_path, teachers, {"loss": {"share": 0.25}, "steps": 1})
    module = module_of(model, teachers)
    batch = batches_of(1)[0]
    with torch.no_grad():
        given = (*module.towers(batch.images, batch.texts), *module.logits())
        base = siglip_loss(*given)
        learned = distillation_loss(*given, teachers=module.teachers.features_of(batch, None))
    names = ("distillation_kl", "distillation_gain")
    expected = {
        "loss": 0.75 * base + 0.25 * learned.loss,
        "base_loss": base,
        "distillation_loss": learned.loss,
        **{name: learned.terms[name] for name in names},
    }
    for name, value in expected.items():
        assert logged[0][f"train/{name}"] == pytest.approx(value.item(), rel=1e-5), name


@pytest.mark.parametrize("form", ["sigmoid", "softmax"])
def test_micro_batches_and_bf16_change_nothing_but_rounding(model, teachers, tmp_path, form):
    loss = {"form": form}
    whole = train(model, tmp_path, teachers, {"loss": loss})
    start = module_of(model, teachers).state_dict()
    micro = train(model, tmp_path, teachers, {"loss": loss, "module": {"micro_batch_size": 3}})
    assert worst_error(micro[1], whole[1], start) < 1e-4
    if form == "softmax":
        return
    half = train(model, tmp_path, teachers, {"loss": loss, "trainer": {"precision": "bf16-mixed"}})
    for ours, theirs in zip(half[2], whole[2], strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=0.05)
    assert half[2] != whole[2]


def test_teachers_are_no_part_of_the_module_and_do_not_change(model, teachers, tmp_path):
    alone = locked_module(model)
    with torch.device("meta"):  # as on ranks that get their values from the first one
        awaiting = module_of(model, teachers)
    assert all(each.is_meta for each in awaiting.parameters())
    assert not any(p.is_meta for e in awaiting.teachers._teachers for p in e.encoder.parameters())
    average = WeightAverage(decay=0.5)
    case = {"trainer": {"callbacks": [average]}}
    module, state, _, trainer = train(model, tmp_path, teachers, case)
    fresh = module_of(model, teachers)
    assert all_equal(fresh.state_dict(), alone.state_dict())  # the same start, too
    names = set(alone.state_dict())
    assert set(state) == names == set(average._average_model.module.state_dict())
    assert average._average_model.module.teachers is module.teachers
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == names
    optimized = sum(len(group["params"]) for group in trainer.optimizers[0].param_groups)
    assert optimized == sum(p.requires_grad for p in alone.parameters())
    for ours, theirs in zip(module.teachers._teachers, fresh.teachers._teachers, strict=True):
        assert not ours.encoder.training
        assert all_equal(ours.encoder.state_dict(), theirs.encoder.state_dict())


def test_a_run_that_is_stopped_goes_on_to_the_bit(model, teachers, tmp_path):
    _, whole, logged, _ = train(model, tmp_path, teachers, {"steps": 4})
    first = train(model, tmp_path, teachers, {"steps": 2})
    first[3].save_checkpoint(tmp_path / "two.ckpt")
    case = {"steps": 4, "start": str(tmp_path / "two.ckpt"), "done": 2}
    _, state, rest, _ = train(model, tmp_path, teachers, case)
    assert all_equal(state, whole)
    assert rest[-1]["train/distillation_kl"] == logged[-1]["train/distillation_kl"]


def test_a_locked_text_tower_learns_from_teachers_through_its_images(model, teachers, tmp_path):
    case = {"module": {"text_tower": TowerConfig(locked=True)}}
    _, state, _, _ = train(model, tmp_path, teachers, case)
    start = module_of(model, teachers, **case["module"]).state_dict()
    moved = [name for name in start if not torch.equal(start[name], state[name])]
    assert any(name.startswith("towers.clip.visual") for name in moved)
    assert not any(name.startswith("towers.clip.text") for name in moved)


@pytest.mark.e2e
def test_two_ranks_wrapped_or_sharded_train_as_one(model, teachers, tmp_path):
    cases = [{"loss": {"form": form}} for form in ("sigmoid", "softmax")]
    cases += [{**cases[0], "sharded": True, "module": {"micro_batch_size": 1}}]
    expected = [train(model, tmp_path, teachers, case) for case in cases]
    start = module_of(model, teachers).state_dict()
    for rank, found in enumerate(run_ranks(train_rank, 2, model, str(tmp_path), teachers, cases)):
        for (state, logged), (_, whole, log, _) in zip(found, expected, strict=True):
            if rank == 0:  # where shards are gathered
                assert worst_error(state, whole, start) < 1e-4
            for ours, theirs in zip(logged, log, strict=True):
                for name in ("loss", "distillation_kl", "distillation_gain"):
                    # the gain is a small difference of entropies of order one, in float32
                    theirs_now = pytest.approx(theirs[f"train/{name}"], rel=1e-4, abs=2e-6)
                    assert ours[f"train/{name}"] == theirs_now


@pytest.mark.e2e
def test_compiled_teachers_say_what_eager_ones_say(model, teachers):
    batch = batches_of(1)[0]
    module = module_of(model, teachers)
    expected = module.teachers.features_of(batch, None)
    module.teachers.compile("aot_eager")
    found = module.teachers.features_of(batch, None)
    assert torch.allclose(found.image, expected.image, atol=1e-5)
    assert torch.allclose(found.text, expected.text, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "loss", "named"),
    [
        ([{"scale": 0.5}], DistillationLoss(), r"bias \(None\) of teachers\[0\] must be a number"),
        ([{}], DistillationLoss(form="softmax"), r"scale \(None\) of teachers\[0\] must be a num"),
        ([], DistillationLoss(), r"loss \(DistillationLoss\) needs teachers"),
        ([{}], WeightedLoss(torch.nn.Identity()), r"loss \(WeightedLoss\) takes no teachers"),
        ([{"pretrained": "x.pt"}], DistillationLoss(), r"pretrained \(x.pt\) is of a model"),
        ([{"other_crops": True}], DistillationLoss(), r"other_crops \(true\) is of features"),
        ([{"model": "TINY"}], DistillationLoss(), r"teachers\[0\].model \(.*\) has no weights"),
        ([{"model": "TINY", "pretrained": "CODE"}], DistillationLoss(), "code.pt"),
        ([{"model": "local-dir:nowhere"}], DistillationLoss(), "names no folder"),
        ([{}, {"features": "f"}], DistillationLoss(), "rows are read from folders or from the sha"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(model, tmp_path, settings, loss, named):
    code = tmp_path / "code.pt"
    code.write_bytes(pickle.dumps(_Code(tmp_path / "ran"), protocol=2))
    names = {"TINY": model, "CODE": str(code)}
    settings = [{key: names.get(value, value) for key, value in each.items()} for each in settings]
    with pytest.raises(UserError, match=named) as caught:
        module_of(model, settings, loss)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


class _Code:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


def test_a_teacher_of_a_softmax_loss_is_for_the_softmax_form_unless_a_bias_is_given(
    model, clip_teacher, caplog
):
    with pytest.raises(UserError, match=r"bias \(None\) of teachers\[0\]"):
        module_of(model, [clip_teacher])
    module_of(model, [{**clip_teacher, "bias": -60.0}])
    found = module_of(model, [clip_teacher], DistillationLoss(form="softmax"))
    assert found.teachers.features_of(batches_of(1)[0], None).scales[0] == pytest.approx(100.0)
    assert "have no logit bias" not in caplog.text  # which is of a student


def test_batches_without_what_teachers_need_are_refused(model, teachers):
    batch = batches_of(1)[0]
    module = module_of(model, teachers)
    with pytest.raises(UserError, match="needs tokens of its own in every batch"):
        module.teachers.features_of(batch._replace(teacher_texts=None), None)
    with pytest.raises(UserError, match=r"images \(torch.float32\) must be uint8"):
        module.teachers.features_of(batch._replace(images=batch.images / 255), None)
    stored = module_of(model, [{"scale": 10.0, "bias": -5.0, "dim": 3}] * 2)
    with pytest.raises(UserError, match=r"teachers\[0\] needs rows of a teacher"):
        stored.teachers.features_of(batch, None)
    rows = torch.eye(4, 5)
    batch = batch._replace(teacher_image_features=rows, teacher_text_features=rows)
    with pytest.raises(UserError, match=r"have 5 and 5 columns.*want dims \[3, 3\]"):
        stored.teachers.features_of(batch, None)


def test_rows_of_the_batch_stand_beside_a_live_teacher_in_the_order_of_the_settings(
    model, teachers
):
    rows = torch.randn(4, 5)
    batch = batches_of(1)[0]._replace(teacher_image_features=rows, teacher_text_features=-rows)
    given = {"scale": 10.0, "bias": -5.0}
    module = module_of(model, [{**given, "dim": 3}, teachers[0], {**given, "dim": 2}])
    found = module.teachers.features_of(batch, None)
    assert found.dims == (3, 8, 2)
    assert torch.equal(found.image[:, [0, 1, 2, 11, 12]], rows)
    assert torch.equal(found.text[:, [0, 1, 2, 11, 12]], -rows)


def test_blocks_of_reinforced_shards_are_those_of_the_entries_without_a_source(model, teachers):
    given = {"scale": 10.0, "bias": -5.0}
    module = module_of(model, [given, teachers[0], given])
    data = SimpleNamespace(datacompdr=DataCompDR(dims=(3, 2)))
    module.teachers.check_data(data)
    rows = torch.randn(4, 5)
    batch = batches_of(1)[0]._replace(teacher_image_features=rows, teacher_text_features=-rows)
    assert module.teachers.features_of(batch, None).dims == (3, 8, 2)
    with pytest.raises(UserError, match=r"dims \(\[3\]\) are of 1 teachers, and 2 of"):
        module.teachers.check_data(SimpleNamespace(datacompdr=DataCompDR(dims=(3,))))
    with pytest.raises(UserError, match=r"teachers\[0\].dim \(3\) differs from the 4"):
        module.teachers.check_data(SimpleNamespace(datacompdr=DataCompDR(dims=(4, 2))))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder, paths = tmp_path_factory.mktemp("shards"), []
    for number, ids in enumerate((range(7), range(7, 20))):
        members = [
            (f"{i:06d}", {"png": encode(picture(i)), "txt": caption(i).encode()}) for i in ids
        ]
        paths.append(str(write_shard(folder / f"{number:05d}.tar", members)))
    return paths


@pytest.fixture(scope="module")
def rows(shards, teachers, tmp_path_factory):
    """Folders of the rows of each teacher."""
    table, folders = build_pair_table(shards, image_extensions=("png",)), []
    for each in teachers:
        folder = tmp_path_factory.mktemp("rows")
        settings = EmbedSettings(towers="both", format="features", dtype="float32", workers=0)
        embed_shards(table, build_dual_encoder(**each), folder, settings)
        folders.append(str(folder))
    return folders


def data_of(shards, module, **settings):
    defaults = {"train_shards": shards, "global_batch_size": 8, "workers_per_rank": 0}
    defaults |= {"train_crop_scale": None, "inputs": module.inputs}
    data = ImageTextDataModule(**defaults | settings)
    data.check(1)
    return data


def test_stored_rows_say_what_the_live_teacher_says(model, teachers, shards, rows):
    """The teacher of the student's size; the other would see the picture at a size of its own."""
    stored, live = module_of(model, [{"features": rows[0]}]), module_of(model, teachers[:1])
    found = []
    for module in (stored, live):
        data = data_of(shards, module)
        module.check_data(data)
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        found.append(module.teachers.features_of(batch, None))
    assert torch.allclose(found[0].image, found[1].image, atol=1e-5)
    assert torch.allclose(found[0].text, found[1].text, atol=1e-5)
    assert found[0][2:] == found[1][2:]


def test_tokens_of_a_live_teacher_come_with_the_batches_of_training(model, teachers, shards):
    module = module_of(model, teachers)
    data = data_of(shards, module, train_crop_scale=(0.5, 1.0), val_shards=shards)
    data.setup("fit")
    assert next(iter(data.train_dataloader())).teacher_texts.shape == (8, 6)
    assert next(iter(data.val_dataloader())).teacher_texts is None


def test_stored_rows_that_are_not_those_of_the_run_are_refused(model, teachers, shards, rows):
    def refused(teacher, words, data=None):
        module = module_of(model, [teacher])
        with pytest.raises(UserError, match=words) as caught:
            module.check_data(data_of(shards, module, **(data or {})))
        assert "\n" not in str(caught.value)

    own = {"features": rows[0]}
    crops = {"train_crop_scale": (0.5, 1.0)}
    refused(own, "train_crop_scale .* shows the model other crops", crops)
    module = module_of(model, [{**own, "other_crops": True}])
    module.check_data(data_of(shards, module, **crops))
    refused(own, r"stages \(1\) change samples", {"stages": [iter]})
    refused({**teachers[1], **own}, r"are not those of teachers\[0\].model: another image tower")
    module = module_of(model, [{**teachers[0], **own}])
    module.check_data(data_of(shards, module))
    assert module.teachers._teachers[0].encoder is None
    refused({**own, "dim": 7}, r"dim \(7\) differs from the 8 columns")
    refused({"features": "nowhere"}, r"teachers.features \(nowhere\) is no folder")


def test_rows_of_a_folder_bring_their_scale_and_bias(model, shards, rows):
    module = module_of(model, [{"features": rows[1]}])
    module.check_data(data_of(shards, module))
    (teacher,) = module.teachers._teachers
    assert (teacher.scale, teacher.bias) == pytest.approx((30.0, -9.0), rel=1e-6)


def test_a_live_teacher_beside_stored_features_of_the_student_is_refused(model, teachers):
    class Data:
        class features:  # noqa: N801 - stands in for an attribute
            towers = ("image",)

    module = module_of(model, teachers)
    with pytest.raises(UserError, match="a live teacher needs pictures and captions"):
        module.teachers.check_data(Data)


def test_a_module_without_teachers_is_as_before(model):
    module = SigLipModule(model)
    assert not module.teachers
    assert module.inputs.teachers.tokenizers == ()
