"""The learning rate climbs, peaks and falls as its schedule says; weight decay spares what should keep its size."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import muon

from meamtm.config import OptimConfig, RunConfig, from_flat, override
from meamtm.errors import ConfigError
from meamtm.model.transformer import AudioTransformer
from meamtm.training.optim import count_state, lr_factor, make_optimizer, set_lr

SCHEDULES = ("cosine", "onecycle", "step", "constant")
schedules = st.sampled_from(SCHEDULES)


def optim(**changes: Any) -> OptimConfig:
    return OptimConfig.model_validate(changes)


def run(**changes: Any) -> RunConfig:
    return from_flat({f"optim.{key}": value for key, value in changes.items()})


def course(config: OptimConfig, num_steps: int, steps_per_epoch: int = 10) -> list[float]:
    return [lr_factor(config, step, num_steps, steps_per_epoch) for step in range(num_steps)]


def tiny_config(pool: str = "cls", **mel: Any) -> RunConfig:
    shape = {"data.clip_s": 0.5, "mel.sample_rate_hz": 8_000, "mel.num_bands": 16, "encoder.stem_channels": [8]}
    width = {"encoder.heads": 1, "encoder.head_dim": 8, "encoder.depth": 1, "encoder.pool": pool}
    return from_flat(shape | width | {f"mel.{key}": value for key, value in mel.items()})


def tiny_model(pool: str = "cls", **mel: Any) -> AudioTransformer:
    torch.manual_seed(0)
    return AudioTransformer(tiny_config(pool, **mel), 3)


@given(schedule=schedules, warmup=st.floats(0, 0.9), final=st.floats(0, 1), num_steps=st.integers(1, 300))
@settings(max_examples=200, deadline=None)
def test_the_rate_lies_between_0_and_its_peak_and_reaches_the_peak(
    schedule: str, warmup: float, final: float, num_steps: int
) -> None:
    factors = course(optim(schedule=schedule, warmup=warmup, final_ratio=final), num_steps)
    assert min(factors) > 0 or final == 0
    assert max(factors) == pytest.approx(1)


@given(schedule=st.sampled_from(["cosine", "onecycle", "constant"]), warmup=st.floats(0, 0.9), final=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_no_joint_jumps(schedule: str, warmup: float, final: float) -> None:
    """Neighbouring steps differ by what the steepest part of a schedule allows, also where two parts meet."""
    num_steps = 400
    config = optim(schedule=schedule, warmup=warmup, final_ratio=final)
    factors = course(config, num_steps)
    num_warmup = max(round(warmup * num_steps), round(0.3 * num_steps) if schedule == "onecycle" else 0)
    steepest = max(math.pi / 2 / max(num_warmup, 1), math.pi / 2 / (num_steps - num_warmup))
    assert max(abs(after - before) for before, after in itertools.pairwise(factors)) <= steepest + 1e-9


@given(schedule=schedules, warmup=st.floats(0.01, 0.9), num_steps=st.integers(50, 300))
@settings(max_examples=100, deadline=None)
def test_the_warm_up_ends_at_the_peak_and_what_follows_begins_there(
    schedule: str, warmup: float, num_steps: int
) -> None:
    factors = course(optim(schedule=schedule, warmup=warmup), num_steps)
    num_warmup = round(warmup * num_steps)
    if schedule == "onecycle":
        num_warmup = max(num_warmup, round(0.3 * num_steps))
    if num_warmup == 0:
        assert factors[0] == 1
        return
    assert factors[num_warmup - 1] == pytest.approx(1)
    assert factors[num_warmup] == pytest.approx(1)
    climb = factors[:num_warmup]
    assert climb == sorted(climb)


def test_a_warm_up_climbs_in_equal_steps() -> None:
    assert course(optim(schedule="constant", warmup=0.4), 10) == pytest.approx([0.25, 0.5, 0.75] + [1] * 7)


@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
def test_a_cosine_ends_at_its_last_ratio(schedule: str) -> None:
    config = optim(schedule=schedule, final_ratio=0.02)
    assert lr_factor(config, 1_000, 1_000, 10) == pytest.approx(0.02)
    assert course(config, 1_000)[-1] == pytest.approx(0.02, abs=1e-5)
    half = 50 + 950 // 2 if schedule == "cosine" else 300 + 700 // 2
    assert lr_factor(config, half, 1_000, 10) == pytest.approx((1 + 0.02) / 2)


def test_onecycle_begins_low_and_peaks_after_three_tenths() -> None:
    factors = course(optim(schedule="onecycle", warmup=0.05), 1_000)
    assert factors[0] == pytest.approx(1 / 25, abs=1e-3)
    assert factors[299] == factors[300] == 1
    assert factors[298] < 1
    assert factors[301] < 1
    assert course(optim(schedule="onecycle", warmup=0.6), 1_000).index(1.0) == 599


def test_steps_drop_after_so_many_epochs_beyond_the_warm_up() -> None:
    config = optim(schedule="step", warmup=0.1, step_epochs=2, step_gamma=0.5)
    factors = course(config, 100, steps_per_epoch=10)
    assert factors[9:30] == [1.0] * 21
    assert factors[30:50] == [0.5] * 20
    assert factors[50:70] == [0.25] * 20
    assert factors[-1] == 0.5**4


def test_setting_the_rate_moves_every_group_by_its_own_scale() -> None:
    weights = [torch.zeros(2, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "lr_scale": 0.1}], lr=1.0)
    lr = set_lr(optimizer, optim(lr=0.5, schedule="constant", warmup=0.5), 0, 8, 4)
    assert lr == 0.5 / 4
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.125, 0.0125])


@pytest.mark.parametrize("pool", ["mean", "cls", "attention"])
def test_biases_norms_and_positions_do_not_decay(pool: str) -> None:
    model = tiny_model(pool)
    optimizer = make_optimizer(model, run(weight_decay=0.3))
    decays = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    assert len(decays) == len(list(model.parameters())) == sum(len(group["params"]) for group in optimizer.param_groups)
    for name, weight in model.encoder.named_parameters():
        spared = weight.ndim <= 1 or name in ("cls_token", "attn_pool.latent") or name.startswith("positions.")
        assert decays[id(weight)] == (0.0 if spared else 0.3), name
    assert set(decays.values()) == {0.0, 0.3}


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lion", "nadamw", "adafactor", "muon"])
def test_timms_optimizers_lower_a_loss(name: str) -> None:
    model = tiny_model()
    optimizer = make_optimizer(model, run(name=name, lr=3e-3))
    waveform = 0.1 * torch.randn(6, 4_000, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(waveform), labels)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0], losses


def test_an_optimizer_that_timm_does_not_know_is_refused() -> None:
    message = r"^optim\.name='adamx': timm cannot build it \(.*\); see timm\.optim\.list_optimizers\(\)$"
    with pytest.raises(ConfigError, match=message):
        make_optimizer(tiny_model(), run(name="adamx"))


def test_an_optimizer_that_needs_second_derivatives_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^optim\.name='adahessian': takes second derivatives, .*; name another$"):
        make_optimizer(tiny_model(), run(name="adahessian"))


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(("name", "is_fused"), [("adamw", True), ("sgd", True), ("lion", False)])
def test_one_pass_over_all_weights_where_the_optimizer_has_it(name: str, is_fused: bool, trainable: bool) -> None:
    optimizer = make_optimizer(tiny_model(trainable=trainable), run(name=name))
    assert bool(optimizer.defaults.get("fused")) == is_fused
    assert all(bool(group.get("fused")) == is_fused for group in optimizer.param_groups)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adafactor", "muon", "adamp", "adagrad"])
def test_what_an_optimizer_will_keep_is_counted_without_its_memory(name: str, trainable: bool) -> None:
    """AdamP looks at numbers in its step, and keeps as many as Adam."""
    config = override(tiny_config(trainable=trainable), {"optim.name": name})
    model = tiny_model(trainable=trainable)
    optimizer = make_optimizer(model, config)
    model(torch.randn(2, 4_000)).sum().backward()
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert count_state(config, 3) == sum(value.numel() for value in kept)


@pytest.mark.parametrize(("precision", "expected"), [("float32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("name", ["muon", "nmuon", "adamuon"])
def test_muon_multiplies_in_the_precision_of_the_run(
    name: str, precision: str, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm's class has no option for it, and a processor without bf16 takes twenty times as long and more in bf16."""
    original, seen = muon.zeropower_via_newtonschulz, []

    def listen(*args: Any, dtype: torch.dtype = torch.bfloat16, **options: Any) -> torch.Tensor:
        seen.append(dtype)
        return original(*args, dtype=dtype, **options)

    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", listen)
    model = tiny_model()
    optimizer = make_optimizer(model, override(run(name=name), {"train.precision": precision}))
    model(torch.randn(2, 4_000)).sum().backward()
    optimizer.step()
    assert set(seen) == {expected}
    assert muon.zeropower_via_newtonschulz is listen, "other optimizers of this process keep theirs"


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "muon"])
def test_a_trained_mel_basis_has_its_own_rate_and_no_decay(name: str) -> None:
    model = tiny_model(trainable=True)
    config = run(name=name, lr=0.2, weight_decay=0.3, mel_lr_scale=0.05, schedule="constant", warmup=0)
    optimizer = make_optimizer(model, config)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    *others, own = optimizer.param_groups
    assert [id(weight) for weight in own["params"]] == [id(model.mel.basis_root)]
    assert (own["lr"], own["weight_decay"]) == (pytest.approx(0.01), 0)
    set_lr(optimizer, config.optim, 0, 8, 4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2] * len(others) + [0.01])
    assert make_optimizer(tiny_model(), config).param_groups[0].keys() == others[0].keys()


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lion", "nadamw", "adafactor", "muon"])
def test_no_optimizer_fills_the_zeros_of_a_trained_mel_basis(name: str) -> None:
    model = tiny_model(trainable=True)
    before = model.mel.basis.detach().clone()
    optimizer = make_optimizer(model, run(name=name, lr=1e-2, weight_decay=0.3))
    for seed in range(3):
        waveform = 0.1 * torch.randn(6, 4_000, generator=torch.Generator().manual_seed(seed))
        torch.nn.functional.cross_entropy(model(waveform), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.mel.basis.detach()
    assert after.isfinite().all()
    assert torch.equal(after[before == 0], before[before == 0])
    assert not torch.equal(after, before)
