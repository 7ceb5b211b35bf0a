"""What the doctor concludes from what it found: each fault of its own, without starting a rank."""

import errno
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from dist_siglip.data.index.read import read_index
from dist_siglip.data.remote import CacheSettings
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.distributed import World
from dist_siglip.doctor import machine as doctor_machine
from dist_siglip.doctor import storage as doctor_storage
from dist_siglip.doctor.command import RunNeeds, judge_feed, judge_needs
from dist_siglip.doctor.machine import (
    gpu_of,
    look_at_environment,
    look_at_limits,
    look_without_gpu,
    unfit_packages,
)
from dist_siglip.doctor.page import BoundedChecks, Finding, merge, render
from dist_siglip.doctor.ranks import (
    ClockReading,
    compare_ranks,
    judge_clocks,
    judge_links,
    look_at_layout,
)
from dist_siglip.doctor.storage import (
    DiskFacts,
    ShardSet,
    judge_disk,
    locked_file,
    look_at_folder,
    look_at_shards,
    look_for_file,
)
from dist_siglip.doctor.together import detect_launch
from dist_siglip.runs import RunFolder
from tests.support.shards import encode, picture, write_shard
from tests.support.small_disk import on_small_disk


def kinds(findings):
    return [(finding.status, finding.check) for finding in findings]


def failing(*_, **__):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


# Folder


def test_a_sound_folder_is_ok_and_left_as_it_was(tmp_path):
    (found,) = look_at_folder(tmp_path / "not yet" / "there", 2**20)
    assert found.check == "run folder"
    assert found.status in ("ok", "warn")  # of this machine
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("os.fsync", "cannot sync a file"),
        ("Path.unlink", "cannot remove a file"),
        ("has_locks", "cannot lock a file"),
        ("open_atomically", "cannot rename a file"),
    ],
)
def test_a_folder_says_what_it_cannot_do(tmp_path, monkeypatch, broken, told):
    monkeypatch.setattr(f"dist_siglip.doctor.storage.{broken}", failing)
    (found,) = look_at_folder(tmp_path, 1000)
    assert found.status == "FAIL"
    assert f"{told}: Input/output error" in found.text
    assert found.remedy


def test_a_folder_without_room_fails_and_keeps_nothing(tmp_path):
    (found,) = on_small_disk(2**20, lambda: look_at_folder(tmp_path, 2**22))
    assert found.status == "FAIL"
    assert "cannot write a file: File too large" in found.text
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_changes_data_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "dist_siglip.doctor.storage.os.fsync", lambda file: os.pwrite(file, b"other", 500)
    )
    (found,) = look_at_folder(tmp_path, 1000)
    assert (found.status, "does not give back" in found.text) == ("FAIL", True)


def test_a_folder_in_use_is_told(tmp_path):
    with RunFolder(tmp_path).lock():
        found = look_at_folder(tmp_path, 1000)
    assert "is in use by another process" in found[-1].text


@pytest.mark.parametrize(
    ("facts", "checkpoint", "status"),
    [
        ({}, 0, "ok"),
        ({"free_bytes": 2**33}, 0, "warn"),  # 8 GiB
        ({"free_bytes": 2**33}, 2**30, "ok"),  # known to be enough
        ({"free_bytes": 2**33}, 2**34, "FAIL"),
        ({"free_bytes": 2**20}, 0, "FAIL"),
        ({"free_inodes": 3}, 0, "FAIL"),
        ({"free_inodes": None}, 0, "ok"),
        ({"bytes_per_second": 1e6}, 0, "warn"),
        ({"rename_seconds": 9.0}, 0, "warn"),
    ],
)
def test_room_and_speed_are_judged_by_what_checkpoints_need(facts, checkpoint, status):
    sound = DiskFacts(Path("/r"), "ext4 at /", 2**40, 10**6, 1e9, 0.01)
    (found,) = judge_disk(sound._replace(**facts), checkpoint)
    assert found.status == status


def test_a_folder_that_is_not_shared_and_a_lock_that_does_not_hold_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_storage, "_VISIBLE_WITHIN_SECONDS", 0.2)
    assert kinds(look_for_file(tmp_path / "never")) == [("FAIL", "shared folder")]
    (tmp_path / "there").write_text("")
    assert kinds(look_for_file(tmp_path / "there")) == [("warn", "shared folder")]
    with locked_file(tmp_path, "locked") as path:
        assert kinds(look_for_file(path)) == [("ok", "shared folder")]


def test_a_folder_without_locks_is_told_and_not_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dist_siglip.doctor.storage.has_locks", lambda path: False)
    found = look_at_folder(tmp_path, 1000)
    assert (found[-1].status, "no locks of files" in found[-1].text) == ("warn", True)


# Shards


def shard_set(path):
    rule, cache = CaptionRule(), CacheSettings()
    pictures = PicturePolicy(max_image_pixels=10**6)
    return ShardSet("train_shards", str(path), rule, ("png",), pictures, cache)


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"png": b"no picture", "txt": b"a"}, "its first sample: "),
        ({"png": encode(picture(0)), "txt": b"  "}, "its first sample: "),
        ({"png": encode(picture(0))}, "caption"),
    ],
)
def test_the_first_pair_of_a_shard_that_cannot_be_used_is_told(tmp_path, members, told):
    path = write_shard(tmp_path / "a.tar", [("0", members)])
    ((found,), _) = look_at_shards(shard_set(path), 4)
    assert found.status == "FAIL"
    assert found.text.startswith("a.tar: ")
    assert told in found.text


def test_a_shard_that_is_cut_short_or_missing_is_told(tmp_path):
    path = write_shard(tmp_path / "a.tar", [("0", {"png": encode(picture(0)), "txt": b"a"})])
    path.write_bytes(path.read_bytes()[:700])
    ((found,), _) = look_at_shards(shard_set(path), 4)
    assert (found.status, "a.tar" in found.text) == ("FAIL", True)
    ((found,), facts) = look_at_shards(shard_set(tmp_path / "none.tar"), 4)
    assert (found.status, facts) == ("FAIL", {})


def test_sound_shards_are_ok_with_a_side_car_and_without_one_told(tmp_path):
    path = write_shard(tmp_path / "a.tar", [("0", {"png": encode(picture(0)), "txt": b"a"})])
    ((found,), facts) = look_at_shards(shard_set(path), 4)
    assert (found.status, "1 of 1 opened had no side-car" in found.text) == ("warn", True)
    read_index(str(path))
    ((found,), again) = look_at_shards(shard_set(path), 4)
    assert (found.status, facts) == ("ok", again)
    assert "train_shards: a.tar" in facts


# Machine


def test_packages_that_are_missing_or_too_old_are_named():
    assert list(unfit_packages(["torch>=1", "no-such-thing>=1", "other; extra == 'x'"])) == [
        "no-such-thing is missing, no-such-thing>=1 is needed"
    ]
    (old,) = unfit_packages(["lightning>=999"])
    assert old.startswith("lightning is ")


@pytest.mark.parametrize(
    ("has_driver", "cuda", "environ", "status"),
    [
        (False, None, {}, "ok"),
        (True, None, {}, "FAIL"),  # a build without CUDA
        (True, "13.0", {}, "FAIL"),  # a driver that is too old, or no GPU in the job
        (True, "13.0", {"CUDA_VISIBLE_DEVICES": ""}, "warn"),
    ],
)
def test_a_missing_gpu_is_judged_by_what_should_be_there(has_driver, cuda, environ, status):
    assert look_without_gpu(has_driver, cuda, environ).status == status


def fake_gpus(monkeypatch, *, count=2, free=1.0, error=1e-4):
    gpu = SimpleNamespace(name="H200", uuid="0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: gpu)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (free * 2**37, 2**37))
    monkeypatch.setattr(doctor_machine, "_largest_error_of_a_product", lambda _: error)


@pytest.mark.parametrize(
    ("fault", "status", "told"),
    [
        ({}, "ok", "2 x H200, 128 GiB"),
        ({"free": 0.5}, "warn", "64 GiB free on cuda:1"),
        ({"error": 0.5}, "FAIL", "a product of matrices is wrong by 5.0e-01"),
        ({"count": 1}, "FAIL", "local rank 1 of 2 sees 1 of the GPUs"),
    ],
)
def test_gpus_that_are_too_few_busy_or_wrong_are_told(monkeypatch, fault, status, told):
    fake_gpus(monkeypatch, **fault)
    world = World(rank=1, world_size=2, local_rank=1, local_world_size=2)
    (found,) = doctor_machine._devices(world)
    assert (found.status, told in found.text) == (status, True), found
    assert gpu_of(World()) == "0"


def test_few_cores_little_shared_memory_and_few_files_are_told():
    assert kinds(look_at_limits(8, 2**31, 65536)) == []
    assert len(list(look_at_limits(1, 2**26, 1024))) == 3


@pytest.mark.parametrize(
    ("environ", "statuses"),
    [
        ({"OMP_NUM_THREADS": "1"}, ["ok"]),
        ({"OMP_NUM_THREADS": "1", "NCCL_SOCKET_IFNAME": "ib"}, ["FAIL"]),
        ({"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}, ["FAIL"]),
        ({"OMP_NUM_THREADS": "1", "NCCL_SOCKET_IFNAME": "^docker"}, ["ok"]),
        ({"OMP_NUM_THREADS": "1", "NCCL_IB_DISABLE": "1", "NCCL_P2P_DISABLE": "1"}, ["warn"] * 2),
        ({"OMP_NUM_THREADS": "1", "TORCH_DISTRIBUTED_DEBUG": "DETAIL"}, ["warn"]),
    ],
)  # fmt: skip
def test_variables_that_break_or_slow_a_run_are_told(environ, statuses):
    world = World(rank=0, world_size=4, local_rank=0, local_world_size=2)
    found = look_at_environment(environ, world, ["lo", "eth0"])
    assert [finding.status for finding in found] == statuses


def test_only_variables_that_steer_a_run_are_shown():
    environ = {"AWS_SECRET_ACCESS_KEY": "s3cret", "HF_TOKEN": "s3cret", "NCCL_DEBUG": "WARN"}
    (found,) = look_at_environment(environ, World(), ["lo"])
    assert found.text == "NCCL_DEBUG=WARN"


# Ranks


def test_links_and_clocks_and_layouts_are_judged():
    assert judge_links([1.0, 1.0, 1.0], ["a"] * 3, 10**9).status == "ok"
    slow = judge_links([1.0, 9.0, 9.0, 1.0], ["a"] * 4, 10**9)
    assert (slow.status, slow.text.startswith("rank 1 (a) to rank 2 (a)")) == ("warn", True)
    # A slow link between nodes is no fault beside quick ones inside them.
    assert judge_links([1e-5, 9e-5, 9e-5, 1e-5], ["a"] * 4, 10**3).status == "ok"  # chance
    two_nodes = [9.0, 1.0, 1.0, 9.0] * 2
    assert judge_links(two_nodes, ["a"] * 4 + ["b"] * 4, 10**9).status == "ok"
    assert judge_links(two_nodes, ["a"] * 8, 10**9).status == "warn"
    for ahead, status in ((0.1, "ok"), (-5.0, "warn"), (4000.0, "FAIL")):
        clocks = [ClockReading(0, 0), ClockReading(ahead, 0.01)]
        assert judge_clocks(clocks, ["a", "b"]).status == status
    assert look_at_layout(["a", "a", "b"])[0][0].status == "warn"
    assert look_at_layout(["a", "a", "b", "b"])[1] == 2
    many = look_at_layout([f"n{rank}" for rank in range(1000)])[0][0].text
    assert many.endswith("n6 (rank 6), ..., n999 (rank 999)")


def test_ranks_that_differ_are_named():
    (found,) = compare_ranks([{"torch": "2.15"}, {"torch": "2.14"}, {"torch": "2.15"}, None])
    assert (found.status, found.text) == ("FAIL", "torch is 2.14 on rank 1 and 2.15 on rank 0, 2")
    assert compare_ranks([{"torch": "2.15"}, None])[0].status == "ok"


SRUN = {
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NAME": "train",
    "SLURM_JOB_ID": "1234567",
    "SLURM_NODELIST": "n[5-6]",
    "SLURMD_NODENAME": "n6",
}


def launch_of(monkeypatch, environ):
    for name in ("MASTER_ADDR", "MASTER_PORT", *SRUN):
        monkeypatch.setenv(name, "")  # so that what Lightning makes of it is undone
        monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return detect_launch(os.environ)


def test_ranks_of_srun_meet_where_lightning_lets_them_meet(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    launch = launch_of(monkeypatch, SRUN)
    assert (launch.world.rank, launch.world.world_size, launch.host) == (3, 4, "n6")
    assert (launch.address, launch.port) == ("n5", 19567)
    two_ranges = SRUN | {"SLURM_NODELIST": "rack1-[01-02]n[1-4]"}
    assert launch_of(monkeypatch, two_ranges).address == "rack1-01n1"


@pytest.mark.parametrize(
    ("changed", "status", "told"),
    [
        ({"SLURM_STEP_ID": None}, "warn", "started without srun in a job of 4 tasks"),
        ({"SLURM_JOB_NAME": "bash"}, "FAIL", "Lightning takes each task for a run"),
        ({"SLURM_NTASKS_PER_NODE": None}, "FAIL", "without --ntasks-per-node"),
        ({"CUDA_VISIBLE_DEVICES": "1"}, "FAIL", "each of the 2 tasks of this node sees 1 GPU"),
        ({"SLURM_NODELIST": "n[a-b]"}, "FAIL", "the node list of SLURM (n[a-b]) cannot be read"),
    ],
)
def test_a_slurm_job_that_fit_would_misread_is_told(monkeypatch, changed, status, told):
    environ = {name: value for name, value in (SRUN | changed).items() if value is not None}
    launch = launch_of(monkeypatch, environ)
    assert (launch.world.world_size, launch.is_silent) == (1, True)
    assert launch.complaint.status == status
    assert told in launch.complaint.text
    assert not launch_of(monkeypatch, environ | {"SLURM_PROCID": "0"}).is_silent


@pytest.mark.parametrize(
    ("needs", "world_size", "num_nodes", "told"),
    [
        ({}, 8, 2, None),
        ({"devices": "auto"}, 8, 2, None),
        ({}, 1, 1, None),
        ({"global_batch_size": 100}, 8, 2, "set it to 96"),
        (
            {"num_nodes": 4},
            8,
            2,
            "--trainer.num_nodes 2 --trainer.devices 4, as train.sbatch says it",
        ),
        ({"accelerator": "gpu"}, 8, 2, "ask the job for GPUs"),
    ],
)
def test_a_configuration_is_compared_with_the_ranks(needs, world_size, num_nodes, told):
    sound = RunNeeds("runs/a", (), 64, 4, 2, "auto")
    found = list(judge_needs(sound._replace(**needs), world_size, num_nodes))
    if told is None:
        assert kinds(found) == [("ok", "configuration")]
    else:
        status = "warn" if "train.sbatch" in told else "FAIL"
        assert (found[0].status, found[0].remedy) == (status, told)


@pytest.mark.parametrize(("free_gib", "status"), [(13, "warn"), (14, "ok")])
def test_what_loaders_have_ready_is_compared_with_shared_memory(free_gib, status):
    """8 ranks x (8 processes x 4 pieces of 256, and a batch of 4,096) x 3 x 224 x 224 bytes."""
    needs = RunNeeds("runs/a", (), 32768, 8, 1, "gpu", workers_per_rank=8)
    found = judge_feed(needs, 4096, 8, free_gib * 2**30)
    assert (found.status, found.check) == (status, "loaders")
    assert "8 ranks x 8 loader processes have at most 13.8 GiB of pictures" in found.text
    small = judge_feed(needs._replace(picture=(112, 112)), 4096, 8, free_gib * 2**30)
    assert (small.status, "at most 3.4 GiB" in small.text) == ("ok", True)


# Page


def test_what_hangs_or_fails_becomes_a_line():
    checks, end = BoundedChecks(2), threading.Event()
    checks.take("a", lambda: [Finding("ok", "a", "fine")])
    checks.take("b", lambda: 1 // 0, remedy="divide by another")
    checks.take("c", end.wait)
    end.set()
    assert kinds(checks.findings) == [("ok", "a"), ("FAIL", "b"), ("FAIL", "c")]
    assert checks.findings[1].text == "integer division or modulo by zero"
    assert checks.has_hung


def test_the_page_of_a_thousand_ranks_is_one_page():
    ranks = [
        [Finding("ok", "host", f"{rank} GiB"), Finding("warn", "disk", f"slow {rank}", "replace")]
        for rank in range(1000)
    ]
    page = render("doctor", merge(ranks))
    assert len(page.splitlines()) < 20
    assert "and 996 more of the kind" in page
    assert "rank 0: slow 0" in page
