"""What was written apart and trains together: on ranks, wrapped and sharded, as in one process."""

import pytest

from tests.support.crossed_ranks import CASES, HALF, LOADED, STEPS, module_of, train
from tests.support.naflex import write_models
from tests.support.processes import run_ranks
from tests.support.sharded_ranks import worst_error
from tests.support.tiny_models import ARCHITECTURES, write_config

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*"),
    pytest.mark.filterwarnings("ignore:.*overrides the configure_model"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return write_models(folder), write_config(folder / "tiny.json", ARCHITECTURES["siglip"])


def test_two_ranks_take_the_steps_of_one_process_whatever_is_joined(models, tmp_path):
    names = list(CASES)
    expected = train(0, 1, models, str(tmp_path), names)
    ranks = run_ranks(train, 2, models, str(tmp_path), names)
    for number, name in enumerate(names):
        whole, losses, seen = expected[number]
        is_curated = CASES[name]["settings"]().get("curation") is not None
        size = HALF.size_of(LOADED) if is_curated else LOADED
        for step in range(STEPS):
            parts = [of_rank[number][2][step] for of_rank in ranks]
            assert [each for part in parts for each in part] == seen[step], name
            assert len(seen[step]) == size, name
        for of_rank in ranks:
            assert of_rank[number][1] == pytest.approx(losses, rel=1e-4), name
        start = module_of(models, CASES[name]).state_dict()
        trained = {k: v for k, v in whole.items() if v.is_floating_point()}
        # Near -10 float32 has steps of 1e-6, and in some cases it moves by 6e-5 in all.
        bias = trained.pop("logits.logit_bias")
        found = ranks[0][number][0]
        assert found["logits.logit_bias"].item() == pytest.approx(bias.item(), abs=5e-6), name
        assert worst_error(found, trained, start) < 3e-4, name
