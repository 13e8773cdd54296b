"""Noise levels, Euler steps, and the policies of a stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from avatar.cache import Conditioning, KVCache, Turn
from avatar.sampling import (
    Pass,
    Reanchor,
    ReferenceDistance,
    denoise_block,
    euler_step,
    in_lockstep,
    reference_position,
    shifted_sigmas,
    sigmas,
    step_modulations,
    timesteps,
)


@pytest.mark.parametrize("steps", [3, 4, 5, 6])
def test_levels_and_walks_are_those_of_the_reference(golden: Any, steps: int) -> None:
    tensors, facts = golden.tensors("scheduler.safetensors"), golden.json("scheduler.json")[str(steps)]
    levels = sigmas(steps)
    assert torch.equal(levels, tensors[f"sigmas.{steps}"])
    assert torch.equal(timesteps(levels), tensors[f"timesteps.{steps}"])
    torch.testing.assert_close(levels, torch.tensor(facts["sigmas"]), rtol=0, atol=0)
    x = tensors[f"x0.{steps}"]
    for velocity, dt, wanted in zip(tensors[f"v.{steps}"], levels.diff(), tensors[f"x.{steps}"]):
        x = euler_step(x, velocity, dt)
        torch.testing.assert_close(x, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", range(1, 9))
def test_levels_fall_from_one_to_zero(steps: int) -> None:
    for levels in (sigmas(steps), shifted_sigmas(steps, 3.0)):
        assert levels.shape == (steps + 1,)
        assert levels.dtype == torch.float32
        assert levels[0] == 1.0
        assert levels[-1] == 0.0
        assert (levels.diff() < 0).all()


def test_two_steps_are_the_two_ends_of_the_grid() -> None:
    torch.testing.assert_close(timesteps(sigmas(2)), torch.tensor([1000.0, 8.9285717]), rtol=0, atol=0)


@pytest.mark.parametrize("steps", range(2, 9))
def test_merging_the_last_step_leaves_the_levels_before_it(steps: int) -> None:
    merged, whole = sigmas(steps, merge_last_step=True), sigmas(steps)
    assert torch.equal(merged, torch.cat([whole[:-2], whole[-1:]]))


@pytest.mark.parametrize("steps", [0, -1, 9])
def test_only_one_to_eight_steps_are_possible(steps: int) -> None:
    for levels in (sigmas, lambda n: shifted_sigmas(n, 3.0)):
        with pytest.raises(ValueError, match=f"steps: {steps}"):
            levels(steps)


def test_a_single_step_has_none_to_merge_with() -> None:
    with pytest.raises(ValueError, match="merge_last_step"):
        sigmas(1, merge_last_step=True)


def test_levels_shifted_once() -> None:
    torch.testing.assert_close(shifted_sigmas(4, 3.0), torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))


def test_bfloat16_latents_see_every_rounding_of_the_reference() -> None:
    torch.manual_seed(0)
    x, velocity = torch.randn(2, 1000).bfloat16()
    dt = sigmas(4).diff()[0]
    assert dt.bfloat16().item() == -0.142578125
    product = (velocity.float() * -0.142578125).bfloat16()
    assert torch.equal(euler_step(x, velocity, dt), (x.float() + product.float()).bfloat16())


def test_float32_latents_see_no_rounding() -> None:
    x, velocity = torch.randn(1000), torch.randn(1000).bfloat16()
    dt = sigmas(4).diff()[0]
    torch.testing.assert_close(euler_step(x, velocity, dt), x + dt * velocity.float(), rtol=0, atol=0)


# Where the reference is.


def test_the_reference_waits_at_30_and_then_keeps_its_distance() -> None:
    assert [reference_position(f0, 4) for f0 in (0, 3, 24, 27, 30, 3000)] == [30, 30, 30, 31, 34, 3004]
    assert [reference_position(f0, 30) for f0 in (0, 3, 3000)] == [30, 33, 3030]


def test_positions_of_a_recorded_stream(golden: Any) -> None:
    for call in golden.json("dit_main_stream_nopose.json")["calls"]:
        assert reference_position(call["first_latent_frame"], call["relative_dist"]) == call["ref_rope_frame"]


def test_one_seed_gives_one_sequence_of_distances() -> None:
    policy = ReferenceDistance()

    def draws(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [policy.draw(generator) for _ in range(500)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert set(draws(1)) == set(range(4, 31))


def test_a_fixed_distance_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    assert ReferenceDistance.fixed(30).positions(6, 4, generator) == [36] * 4
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(("low", "high"), [(5, 4), (-1, 3), (4, 31)])
def test_distances_beyond_the_trained_range_are_refused(low: int, high: int) -> None:
    with pytest.raises(ValueError, match=f"{low}..{high}"):
        ReferenceDistance(low, high)


def test_policies_are_named_as_in_the_settings() -> None:
    assert [Reanchor(name) for name in ("none", "reference", "reference+motion")] == list(Reanchor)


# One block.


class Straight:
    """A network that knows the answer: the velocity that leads straight from the noise to `clean`."""

    enter = None

    def __init__(self, noise: Tensor, clean: Tensor) -> None:
        self.velocity = noise - clean
        self.calls: list[tuple[float, Any, int]] = []

    def modulation(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return t, t

    def condition(self, cache, conditioning) -> None:
        cache.version = conditioning.version

    def step_by_layer(
        self, x, time, conditioning, text, audio, cache, f0, reference_position, pose=None, mask=None
    ) -> Pass:
        assert cache.version == conditioning.version
        self.calls.append((time[0].item(), cache, reference_position))
        yield Turn(0, cache, conditioning, None, 0, 0)
        return self.velocity


@pytest.mark.parametrize("merge_last_step", [False, True])
@pytest.mark.parametrize("steps", [2, 4, 8])
def test_a_block_takes_each_level_with_its_own_cache(steps: int, merge_last_step: bool) -> None:
    noise, clean = torch.randn(2, 1, 4, 3, 2, 2)
    dit = Straight(noise, clean)
    levels = sigmas(steps, merge_last_step=merge_last_step)
    count = steps - merge_last_step
    caches = [KVCache([], [], 0) for _ in range(count)]
    conditioning = Conditioning([], [], [], 0, 0, version=1)
    positions = list(range(30, 30 + count))
    times = step_modulations(dit, levels)
    latents = denoise_block(dit, noise, conditioning, caches, levels, times, [], [], 3, positions)
    torch.testing.assert_close(latents, clean, rtol=1e-5, atol=1e-5)
    assert dit.calls == list(zip(timesteps(levels).tolist(), caches, positions))


def test_passes_go_through_a_layer_together() -> None:
    seen: list[tuple[str, int]] = []

    def layers(name: str, count: int) -> Pass:
        for i in range(count):
            yield Turn(i, KVCache([], [], 0), Conditioning([], [], [], 0, 0), None, 0, 0)
            seen.append((name, i))
        return torch.tensor(count)

    told: list[tuple[int, list[int]]] = []
    results = in_lockstep(
        [layers("a", 3), layers("b", 3)], lambda turns, number: told.append((number, [turn.layer for turn in turns]))
    )
    assert told == [(0, [0, 0]), (1, [1, 0]), (0, [1, 1]), (1, [2, 1]), (0, [2, 2]), (1, [2, 2]), (2, [2, 2])]
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert [result.item() for result in results] == [3, 3]


def test_a_pass_may_be_through_before_the_others() -> None:
    def layers(count: int) -> Pass:
        for i in range(count):
            yield Turn(i, KVCache([], [], 0), Conditioning([], [], [], 0, 0), None, 0, 0)
        return torch.tensor(count)

    assert [result.item() for result in in_lockstep([layers(1), layers(3), layers(2)])] == [1, 3, 2]
