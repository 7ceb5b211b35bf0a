import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.evaluation import Benchmark, BenchmarkResult, EvaluatedModel
from dist_siglip.evaluation.benchmark import check_benchmarks
from dist_siglip.models import build_dual_encoder
from dist_siglip.models.dual_encoder import evaluation_mode
from tests.support.shards import tiny_inputs
from tests.support.tiny_models import ARCHITECTURES, inputs_of, write_config


class Constant(Benchmark):
    """Always the same number."""

    task = "constant"

    def evaluate(self, model, *, group=None):
        return BenchmarkResult({"one": 1.0}, {})


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b"])
def test_a_name_that_is_no_file_name_is_refused(name):
    with pytest.raises(UserError, match="must be letters, digits"):
        Constant(name).check()


def test_two_benchmarks_of_one_name_are_refused():
    check_benchmarks([Constant("a"), Constant("b")])
    with pytest.raises(UserError, match="have the name 'a' twice"):
        check_benchmarks([Constant("a"), Constant("a")])


def test_a_wrapped_encoder_gives_the_features_of_its_towers(tmp_path):
    built = build_dual_encoder(write_config(tmp_path / "tiny.json", ARCHITECTURES["clip"]))
    pixels, texts = inputs_of(ARCHITECTURES["clip"])
    model = EvaluatedModel.of(
        built.encoder, tiny_inputs(), logit_scale=1.0, logit_bias=0.0, device=torch.device("cpu")
    )
    with evaluation_mode(built.encoder), torch.no_grad():
        assert torch.equal(model.encode_text(texts), built.encoder.encode_text(texts))
        bytes_of = (pixels * 40 + 128).clamp(0, 255).byte()
        expected = built.encoder.encode_image((bytes_of / 255 - 0.5) / 0.5)
        assert torch.allclose(model.encode_image(bytes_of), expected, atol=1e-6)
    assert not model.encode_text(texts).requires_grad
