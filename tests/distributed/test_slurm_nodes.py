"""Where rank 0 of a SLURM job is, and which GPUs its tasks see."""

import pytest

from dist_siglip.cli.run.trainer_parts import SlurmTasks, check_gpus
from dist_siglip.distributed.slurm_nodes import complain_about_gpus, first_node, main_address
from dist_siglip.errors import UserError

TASK = {"SLURM_NTASKS_PER_NODE": "2(x3)", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "1"}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("rack1-[01-02]n[1-4]", "rack1-01n1"),
        ("n5", "n5"),
        ("n[5-9]", "n5"),
        ("n[5,7-9]", "n5"),
        ("n[05]", "n05"),
        ("a-b-[008-010,12],c[1-2]", "a-b-008"),
        ("login,rack[1-2]", "login"),
        ("r[1-2,4]s[3,5-6]-ib.site.org,x", "r1s3-ib.site.org"),
        ("host0 host1", "host0"),
        ("127.0.0.1", "127.0.0.1"),
    ],
)
def test_the_first_node_of_a_list(nodes, first):
    assert first_node(nodes) == first


@pytest.mark.parametrize("nodes", ["n[a-b]", "n[1-2", "", "[]", "n[1]]"])
def test_a_list_that_cannot_be_read_asks_for_the_address(nodes):
    with pytest.raises(UserError, match="cannot be read; set MASTER_ADDR to the name of its first"):
        first_node(nodes)


def test_the_address_is_that_of_the_user_the_step_and_the_job_in_this_order():
    environ = {"SLURM_NODELIST": "n[1-4]"}
    assert main_address(environ) == "n1"
    environ["SLURM_STEP_NODELIST"] = "n[3-4]"
    assert main_address(environ) == "n3"
    environ["MASTER_ADDR"] = "10.0.0.7"
    assert main_address(environ) == "10.0.0.7"


@pytest.mark.parametrize(
    "changed",
    [
        {"CUDA_VISIBLE_DEVICES": "0,1"},
        {"CUDA_VISIBLE_DEVICES": ""},
        {"SLURM_NTASKS_PER_NODE": "1"},
        {"SLURM_LOCALID": None},
    ],
)
def test_tasks_that_see_all_gpus_or_none_are_fine(changed):
    environ = {name: value for name, value in (TASK | changed).items() if value is not None}
    assert complain_about_gpus(environ) == ""


def test_a_task_with_a_gpu_of_its_own_is_refused_where_gpus_are_used():
    settings = {"accelerator": "gpu", "devices": 2}
    remedy = r"trainer.devices \(2\): each of the 2 tasks .* sees 1 GPU .*--gpus-per-node=2 without"
    with pytest.raises(UserError, match=remedy):
        check_gpus(settings, TASK)
    check_gpus({"accelerator": "cpu", "devices": 2}, TASK)
    check_gpus(settings, TASK | {"RANK": "1"})  # torchrun has said which GPU is whose


def test_what_lightning_refuses_about_a_job_is_a_mistake_in_one_line(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    with pytest.raises(UserError, match=r"--ntasks=4"):
        SlurmTasks()
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    monkeypatch.setenv("SLURM_NODELIST", "rack1-[01-02]n[1-4]")
    monkeypatch.delenv("SLURM_STEP_NODELIST", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "")
    tasks = SlurmTasks()
    with pytest.raises(UserError, match=r"devices=1.*--ntasks-per-node=2"):
        tasks.validate_settings(num_devices=1, num_nodes=2)
    assert tasks.main_address == "rack1-01n1"
