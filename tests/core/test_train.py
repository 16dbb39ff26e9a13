"""Training: exact resume, equal processes, honest stops, and the command."""

import json
import logging
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from dsgnn import cli
from dsgnn.config import CONFIGS
from dsgnn.data.sample import Sample
from dsgnn.data.transforms import collate, example
from dsgnn.model import build_model
from dsgnn.runtime.disk.files import claimed
from dsgnn.runtime.errors import CheckpointError, FolderBusyError, OptionError
from dsgnn.training import loop
from dsgnn.training.batches import mix
from dsgnn.training.journal import curve, read_log
from dsgnn.training.loop import RunOptions
from dsgnn.training.parallel import join
from dsgnn.training.recipe import (
    Recipe,
    TrainingPlan,
)
from dsgnn.training.state import layout, start
from dsgnn.training.step import Step
from dsgnn.weights.checkpoint import load_checkpoint, origin_of

SHORT = Recipe(iterations=4, batch=2, points=64, learning_rate=1e-3, clip=1.0)


class Blocks:
    """A source of the samples as they are, over and over."""

    def __init__(self, samples):
        self.samples = samples

    def example(self, number, size):
        return example(self.samples[number % len(self.samples)])


def train(config, source, out, recipe, validation=None, seed=0, amp="off", **options):
    plan = TrainingPlan(config, recipe, seed, amp)
    return loop.train(plan, source, out, RunOptions(**options), validation)


def make_step(config, recipe, out):
    plan = TrainingPlan(config, recipe)
    return Step(plan, start(plan, out, torch.device("cpu")), out)


def losses(out):
    return [record["losses"] for record in read_log(out) if "losses" in record]


@pytest.mark.parametrize("kind", ["tiny", "tiny_nano"])
def test_a_resumed_run_equals_an_uninterrupted_one(kind, request, samples, tmp_path):
    config = request.getfixturevalue(kind)
    recipe = replace(SHORT, ema=0.9 if kind == "tiny_nano" else 0.0, accumulate=2)
    options = dict(validation=samples[:2], every=2, log_every=1, seed=5)
    whole = train(config, Blocks(samples), tmp_path / "whole", recipe, **options)

    class Stops(Blocks):
        def example(self, number, size):
            if number >= 3 * 2 * recipe.batch:  # after three of four iterations
                raise OSError("the disk is gone")
            return super().example(number, size)

    with pytest.raises(OSError, match="the disk is gone"):
        train(config, Stops(samples), tmp_path / "cut", recipe, **options)
    assert len(losses(tmp_path / "cut")) == 3  # the third is after the last checkpoint
    resumed = train(config, Blocks(samples), tmp_path / "cut", recipe, resume=True, **options)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    records = read_log(tmp_path / "cut")
    assert [r["iteration"] for r in records] == [1, 2, 2, 3, 4, 4]
    assert [r["evaluation"] for r in records if "evaluation" in r] == [
        r["evaluation"] for r in read_log(tmp_path / "whole") if "evaluation" in r
    ]
    loaded, weights = load_checkpoint(tmp_path / "cut" / "last.safetensors")
    assert weights == "trained" and loaded.config == config
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    assert (tmp_path / "cut" / "best.safetensors").is_file()
    assert list((tmp_path / "cut" / "tensorboard").iterdir())
    assert curve(tmp_path / "cut").read_bytes().startswith(b"\x89PNG")


def test_training_learns(tiny_nano, samples, tmp_path):
    recipe = replace(SHORT, iterations=40, learning_rate=3e-3, clip=5.0, points=256)
    train(tiny_nano, Blocks(samples), tmp_path, recipe, log_every=10)
    first, *_, last = [r["loss"] for r in read_log(tmp_path)]
    assert last < 0.7 * first


def test_a_run_is_not_overwritten_and_not_resumed_with_other_settings(tiny_nano, samples, tmp_path):
    recipe = replace(SHORT, iterations=1)
    train(tiny_nano, Blocks(samples), tmp_path, recipe)
    with pytest.raises(ValueError, match="holds a run already: resume it"):
        train(tiny_nano, Blocks(samples), tmp_path, recipe)
    with pytest.raises(
        ValueError, match=r"\(seed was 0, now 1\).*from the weights .*last.safetensors"
    ):
        train(tiny_nano, Blocks(samples), tmp_path, recipe, resume=True, seed=1)


def test_two_runs_into_one_folder_are_refused(tiny_nano, samples, tmp_path):
    """The second one would write over the first one's checkpoints and log."""
    recipe = replace(SHORT, iterations=1)
    with claimed(tmp_path), pytest.raises(FolderBusyError, match="another run is writing into"):
        train(tiny_nano, Blocks(samples), tmp_path, recipe)
    assert not list(tmp_path.iterdir())
    train(tiny_nano, Blocks(samples), tmp_path, recipe)
    other = tmp_path / "other"
    other.mkdir()
    with claimed(other), pytest.raises(FolderBusyError):
        weights = tmp_path / "last.safetensors"
        train(tiny_nano, Blocks(samples), other, recipe, initial_weights=weights)
    assert not list(other.iterdir())


def test_what_differs_is_named_and_nothing_else(tiny_nano, samples, tmp_path):
    train(tiny_nano, Blocks(samples), tmp_path, replace(SHORT, iterations=2))
    other = replace(tiny_nano, threshold=0.6)
    shorter, was = replace(SHORT, iterations=1), tiny_nano.threshold
    for config, recipe, difference in (
        (other, replace(SHORT, iterations=2), f"config.threshold was {was}, now 0.6"),
        (tiny_nano, shorter, "recipe.iterations was 2, now 1"),
    ):
        with pytest.raises(OptionError, match=rf"other settings \({difference}\): resume") as error:
            train(config, Blocks(samples), tmp_path, recipe, resume=True)
        assert "resume" in error.value.about


def test_a_run_can_be_extended(tiny_nano, samples, tmp_path, caplog):
    train(tiny_nano, Blocks(samples), tmp_path, replace(SHORT, iterations=2), log_every=1)
    longer = replace(SHORT, iterations=4)
    train(tiny_nano, Blocks(samples), tmp_path, longer, log_every=1, resume=True)
    assert "extended from 2 to 4 iterations" in caplog.text
    assert [record["iteration"] for record in read_log(tmp_path)] == [1, 2, 3, 4]
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["iteration"] == 4 and state["run"]["recipe"]["iterations"] == 4


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other", "gone"])
def test_a_damaged_state_offers_the_one_before(damage, tiny_nano, samples, tmp_path):
    recipe = replace(SHORT, iterations=2)
    whole = train(tiny_nano, Blocks(samples), tmp_path / "whole", recipe, every=1)
    train(tiny_nano, Blocks(samples), tmp_path / "run", recipe, every=1)
    state, before = tmp_path / "run" / "state.pt", tmp_path / "run" / "state.before.pt"
    content = {"cut": state.read_bytes()[:5000], "empty": b"", "text": b"iteration: 2\n"}
    if damage == "other":
        torch.save({"weights": torch.zeros(2)}, state)
    elif damage == "gone":
        state.unlink()
    else:
        state.write_bytes(content[damage])
    advice = r"state.pt is damaged.*rename .*state.before.pt to state.pt .*or start another run"
    with pytest.raises(CheckpointError, match=advice):
        train(tiny_nano, Blocks(samples), tmp_path / "run", recipe, resume=True, every=1)
    before.rename(state)
    resumed = train(tiny_nano, Blocks(samples), tmp_path / "run", recipe, resume=True, every=1)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_frozen_stem_is_not_left_random(tiny_nano, samples, tmp_path):
    frozen = replace(tiny_nano, frozen=("conv1", "layer1"))
    recipe = replace(SHORT, iterations=1)
    with pytest.raises(OptionError, match="does not train conv1, layer1 .*stay random") as error:
        train(frozen, Blocks(samples), tmp_path / "random", recipe)
    assert error.value.about == ("initial_weights",)  # the command says --init
    assert not (tmp_path / "random").exists()
    train(tiny_nano, Blocks(samples), tmp_path / "first", recipe)
    weights, out = tmp_path / "first" / "last.safetensors", tmp_path / "second"
    train(frozen, Blocks(samples), out, recipe, initial_weights=weights)
    resumed = train(frozen, Blocks(samples), out, recipe, resume=True)  # needs no weights again
    loaded, _ = load_checkpoint(weights)
    kept = "backbone.body.conv1.weight"
    assert torch.equal(resumed.state_dict()[kept], loaded.state_dict()[kept])


def test_a_run_says_what_it_is_about_to_do(tiny_nano, samples, tmp_path, capsys):
    train(tiny_nano, Blocks(samples), tmp_path, SHORT, log_every=2)
    count = sum(p.numel() for p in build_model(tiny_nano).parameters()) / 1e6
    said = capsys.readouterr().out
    assert f"tiny-nano: {count:.2f} million parameters" in said
    assert "iterations: 0 of 4 done, each of 2 images" in said
    assert f"written into: {tmp_path}" in said
    assert said.count("expected time: 0:00:0") == 1


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
def test_a_resumed_optimiser_counts_on_the_cpu(tiny_nano, samples, tmp_path):
    """As a fresh one does: on a GPU each of its counters would be waited for in each step."""
    recipe = replace(SHORT, iterations=1)
    train(tiny_nano, Blocks(samples), tmp_path, recipe)
    elsewhere = torch.device("meta")  # stands for a GPU
    state = start(TrainingPlan(tiny_nano, recipe), tmp_path, elsewhere, resume=True)
    assert state.iteration == 1 and state.optimiser.state
    for values in state.optimiser.state.values():
        assert values["step"].device.type == "cpu" and values["step"] == 1
        assert values["exp_avg"].device.type == values["exp_avg_sq"].device.type == "meta"


def test_the_rate_is_of_training_without_evaluating_and_saving(tiny_nano, samples, tmp_path,
                                                               monkeypatch):  # fmt: skip
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("dsgnn.training.loop.time", clock)

    class Timed(Blocks):
        def example(self, number, size):
            clock.now += 0.5
            return super().example(number, size)

    class Slow(list):
        def __getitem__(self, index):
            clock.now += 1000
            return super().__getitem__(index)

    validation = Slow(samples[:2])
    train(tiny_nano, Timed(samples), tmp_path, SHORT, validation=validation, every=1, log_every=1)
    assert clock.now == 4 * (2 * 0.5 + 2 * 1000)
    assert [r["images_per_s"] for r in read_log(tmp_path) if "losses" in r] == [2.0] * 4


def test_nothing_to_resume_is_said(tiny_nano, samples, tmp_path, caplog):
    train(tiny_nano, Blocks(samples), tmp_path, replace(SHORT, iterations=1), resume=True)
    assert "no run to resume here yet" in caplog.text


def test_a_batch_without_objects_trains(tiny, tiny_nano, tmp_path):
    empty = Sample(np.full((64, 64, 3), 9, np.uint8), np.zeros((0, 64, 64), bool),
                   np.zeros(0, np.int64), "empty")  # fmt: skip
    for config in (tiny, tiny_nano):
        out = tmp_path / config.name
        train(config, Blocks([empty]), out, replace(SHORT, iterations=2), log_every=1)
        assert all(math.isfinite(record["loss"]) for record in read_log(out))


def test_a_loss_that_is_not_finite_stops_with_the_batch_named(tiny_nano, samples, tmp_path):
    class Poisoned(Blocks):
        def example(self, number, size):
            item = super().example(number, size)
            ranks = item.ranks.float()
            return replace(item, ranks=ranks * math.nan if number == 5 else ranks)

    with pytest.raises(FloatingPointError, match="loss of iteration 3 is not finite") as error:
        train(tiny_nano, Poisoned(samples), tmp_path, SHORT, every=2)
    assert f"nan on process 0 for {samples[4].name}, {samples[5].name}" in str(error.value)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["iteration"] == 2
    model, _ = load_checkpoint(tmp_path / "last.safetensors")
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_gradient_that_is_not_finite_stops_too(tiny_nano, samples, tmp_path, monkeypatch):
    norm = nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *a: norm(*a) * math.inf)
    with pytest.raises(FloatingPointError, match="gradient of iteration 1 is not finite: inf"):
        train(tiny_nano, Blocks(samples), tmp_path, SHORT)


def test_one_image_a_batch_says_why_the_cross_image_loss_is_off(tiny, samples, tmp_path, caplog):
    train(
        tiny, Blocks(samples), tmp_path / "one", replace(SHORT, iterations=2, batch=1), log_every=1
    )
    (message,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert "cross-image and difference losses compare the images of one process's batch" in message
    for record in losses(tmp_path / "one"):
        off = ("domain_cross_image", "domain_difference_s", "domain_difference_t")
        assert [record[name] for name in off] == [0, 0, 0]
    caplog.clear()
    train(tiny, Blocks(samples), tmp_path / "two", replace(SHORT, iterations=1))
    assert not caplog.records and losses(tmp_path / "two")[0]["domain_cross_image"] > 0


def test_a_step_takes_the_mean_gradient_of_its_passes(tiny_nano, samples, tmp_path):
    recipe = replace(SHORT, accumulate=3, clip=1e9)
    batches = [collate([example(s) for s in samples[i : i + 2]]) for i in (0, 2, 4)]
    step = make_step(tiny_nano, recipe, tmp_path)
    totals = step(1, iter(batches))
    by_hand = make_step(tiny_nano, recipe, tmp_path)
    for number, batch in enumerate(batches):
        terms = by_hand.losses(batch, mix(0, 1, number, 0))
        (sum(terms.values()) / 3).backward()
        totals = {name: total - terms[name].detach() / 3 for name, total in totals.items()}
    assert all(abs(left) < 1e-4 for left in totals.values())
    for ours, expected in zip(
        step.state.model.parameters(), by_hand.state.model.parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, expected.grad)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains(tiny, samples, tmp_path, amp):
    train(tiny, Blocks(samples), tmp_path, replace(SHORT, iterations=2), amp=amp, log_every=1)
    train(tiny, Blocks(samples), tmp_path / "off", replace(SHORT, iterations=2), log_every=1)
    mixed, full = (read_log(out)[0]["loss"] for out in (tmp_path, tmp_path / "off"))
    assert mixed != full and mixed == pytest.approx(full, rel=0.1)


def test_another_precision_is_refused(tiny, samples, tmp_path):
    with pytest.raises(ValueError, match="amp must be one of off, bf16, fp16, got 'int8'"):
        train(tiny, Blocks(samples), tmp_path, SHORT, amp="int8")


@pytest.mark.parametrize(
    ("device", "rank", "message"),
    [
        ("cuda:1", "0", "gives each process its own GPU: use the device cuda, got cuda:1"),
        (
            "cuda",
            "2",
            r"process 2 .* has no GPU of its own \(2 seen\): let torchrun start 2",
        ),
    ],
)
def test_processes_without_a_gpu_of_their_own_are_told(monkeypatch, device, rank, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(ValueError, match=message):
        join(device)


WORKER = """
import json, math, sys
from dataclasses import replace
from pathlib import Path
import torch
from dsgnn.training.batches import Epochs
from dsgnn.config import config_from_dict
from dsgnn.data import open_data
from dsgnn.training.parallel import join, leave, process
from dsgnn.training.recipe import Recipe, TrainingPlan
from dsgnn.training.loop import RunOptions, train

class Poisoned(Epochs):
    def example(self, number, size):
        item = super().example(number, size)
        return replace(item, ranks=item.ranks * (math.nan if number == 3 else 1.0))

torch.set_num_threads(1)
configs, data, out = sys.argv[1:]
device, rank = join("cpu"), process()[0]
recipe = Recipe(iterations=2, batch=1, accumulate=2, points=64, learning_rate=1e-3, clip=1.0)
for config in map(config_from_dict, json.loads(configs)):
    folder = Path(out) / config.name
    source = Epochs(open_data(data, "train"), "flip", 0)
    plan = TrainingPlan(config, replace(recipe, ema=0.5 * (not config.texture)))
    options = RunOptions(log_every=1, device=device)
    model = train(plan, source, folder, options, open_data(data, "val"))
    torch.save(model.state_dict(), folder / f"rank{rank}.pt")
try:
    poisoned = Poisoned(open_data(data, "train"), "flip", 0)
    train(TrainingPlan(config, recipe), poisoned, Path(out) / "bad")
except FloatingPointError as error:
    (Path(out) / f"error{rank}.txt").write_text(str(error))
leave()
"""


def test_two_processes_end_with_the_same_parameters(tiny, tiny_nano, assr, tmp_path):
    worker, out = tmp_path / "worker.py", tmp_path / "run"
    worker.write_text(WORKER)
    configs = json.dumps([tiny.to_dict(), tiny_nano.to_dict()])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(worker), configs, str(assr), str(out)],
        capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for config in (tiny, tiny_nano):
        folder = out / config.name
        first, second = (torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(2))
        torch.manual_seed(0)
        before = build_model(config).state_dict()
        parameters = [name for name, _ in build_model(config).named_parameters()]
        for name in parameters:
            assert torch.equal(first[name], second[name]), name
        moved = sum(not torch.equal(first[n], before[n]) for n in parameters)
        assert moved > len(parameters) / 2
        records = read_log(folder)
        assert [r["images"] for r in records if "losses" in r] == [4, 8]
        assert records[-1]["evaluation"]["mae"] is not None
    errors = [(out / f"error{r}.txt").read_text() for r in range(2)]
    assert errors[0] == errors[1]
    assert re.search(r"nan on process 1 for blocks\d\.", errors[0])


def test_a_strided_convolution_has_its_gradient_in_the_layout_of_training():
    """In channels_last it crashed the process on a CPU with AVX-512."""
    form = layout(torch.device("cpu"))
    conv = torch.nn.Conv2d(8, 16, 1, 2, bias=False).to(memory_format=form)
    images = torch.randn(2, 8, 40, 56).contiguous(memory_format=form)
    for _ in range(20):
        conv.weight.grad = None
        conv(images.requires_grad_()).sum().backward()
        expected = images.detach()[:, :, ::2, ::2].double().sum((0, 2, 3)).float()
        torch.testing.assert_close(conv.weight.grad[..., 0, 0], expected.expand(16, 8))


def test_the_command_trains_resumes_and_reports_wrong_use(assr, tmp_path, monkeypatch, tiny_nano):
    monkeypatch.setitem(CONFIGS, "nano", tiny_nano)
    out = tmp_path / "run"
    base = ["--config", "nano", "--data", str(assr), "--out", str(out), "--iterations", "2",
            "--batch", "2", "--workers", "1", "--device", "cpu"]  # fmt: skip
    done = CliRunner().invoke(cli.train, base)
    assert done.exit_code == 0, done.output
    names = {path.name for path in out.iterdir()}
    assert {"last.safetensors", "best.safetensors", "state.pt", "log.jsonl", "curve.png"} <= names
    assert "iteration 2: sa_sor" in done.output
    assert "training images 4, validation images 2" in done.output
    best = out / "best.safetensors"
    assert (
        f"trained: {best}; measure it with: dsgnn-eval {best} --data {assr} --split test\n"
        in done.output
    )
    assert origin_of(out / "last.safetensors") == "assr (train), 2 iterations of 2 images"
    again = CliRunner().invoke(cli.train, base)
    assert again.exit_code == 2 and "--resume" in again.output
    assert CliRunner().invoke(cli.train, [*base, "--resume"]).exit_code == 0
    other = CliRunner().invoke(cli.train, [*base, "--resume", "--val", "test"])
    assert other.exit_code == 2 and "val was val, now test" in " ".join(other.output.split())
    leak = CliRunner().invoke(cli.train, [*base, "--split", "train+val"])
    assert leak.exit_code == 2 and "--val" in leak.output
    both = [*base[:4], "--out", str(tmp_path / "both"), *base[6:], "--split", "train+val",
            "--val", "none", "--init", str(out / "last.safetensors")]  # fmt: skip
    done = CliRunner().invoke(cli.train, both)
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "both" / "best.safetensors").exists()
    assert not json.loads((tmp_path / "both" / "init.json").read_text())["fresh"]
    (assr / "rank_order" / "train" / "blocks0.json").unlink()
    broken = CliRunner().invoke(cli.train, [*base[:4], "--out", str(tmp_path / "b"), *base[6:]])
    assert broken.exit_code == 1 and re.search(r"blocks0\.json", broken.output)
    assert "Traceback" not in broken.output


def test_a_log_that_was_cut_off_in_a_line_is_read_up_to_it(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"iteration": 1}\n{"iterat')
    assert read_log(tmp_path) == [{"iteration": 1}]
    (tmp_path / "log.jsonl").write_text('{"iteration": 1}\noops\n{"iteration": 2}\n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_log(tmp_path)
    assert curve(tmp_path / "nowhere") is None
