"""The simulation where the answer can be had by hand."""

import pytest

from dvd.plan.model import Costs, Fleet, Kind, LanguageCosts, Load, VisionCosts, work
from dvd.plan.simulation import Outcome, percentile, simulate


def costs(**changed: float) -> Costs:
    """A tile costs 100 ms of a vision worker; 256 tokens cost 64 ms of a language worker, an answer's token 1 ms."""
    vision = {"prepare": 0.001, "tile": 0.1, "batch_tiles": 1, "network": 1e18}
    language = {"prefill": 0.00025, "decode": 0.001, "step_tokens": 4096}
    vision |= {name: value for name, value in changed.items() if name in VisionCosts.model_fields}
    language |= {name: value for name, value in changed.items() if name in LanguageCosts.model_fields}
    return Costs(
        vision=VisionCosts.model_validate(vision), language=LanguageCosts.model_validate(language), bytes_per_token=1000
    )


def load(rate: float = 0.001, compressed: float = 0.0, **kind: float) -> Load:
    return Load(rate=rate, compressed=compressed, kinds=[Kind.model_validate({"text": 1, "output": 1, **kind})])


COLOCATED = Fleet(vision=0, language=1, deployment="colocated")


def ttft(outcome: Outcome) -> float:
    return percentile(outcome.ttft, 0.5)


def test_a_request_alone_waits_for_each_stage_in_turn() -> None:
    outcome = simulate(costs(), load(), Fleet(), requests=20)
    assert ttft(outcome) == pytest.approx(0.001 + 0.1 + 257 * 0.00025 + 0.001)
    assert outcome.itl == []


def test_a_colocated_request_alone_waits_as_long() -> None:
    assert ttft(simulate(costs(), load(), COLOCATED, requests=20)) == pytest.approx(
        ttft(simulate(costs(), load(), Fleet(), requests=20))
    )


def test_several_tiles_and_images_are_prepared_on_all_cores_and_encoded_in_batches() -> None:
    outcome = simulate(costs(cores=2, batch_tiles=4, batch=0.02), load(images=2, tiles=3), Fleet(), requests=10)
    read = 2 * 3 * 256 + 1
    # both images are ready after 3 ms; the first three tiles are a batch of their own or four are, five being left at most
    assert ttft(outcome) == pytest.approx(0.003 + 6 * 0.1 + 2 * 0.02 + read * 0.00025 + 0.001)


def test_what_is_there_already_is_not_encoded() -> None:
    outcome = simulate(costs(), load(repeated=1.0), Fleet(), requests=20)
    assert ttft(outcome) == pytest.approx(257 * 0.00025 + 0.001)
    assert outcome.busy["vision"] == outcome.network == 0


@pytest.mark.parametrize("step_tokens", [64, 100, 4096])
def test_a_long_prompt_costs_more_than_its_tokens_in_however_many_steps(step_tokens: int) -> None:
    outcome = simulate(costs(attention=1e-6, step_tokens=step_tokens), load(repeated=1.0), Fleet(), requests=20)
    assert ttft(outcome) == pytest.approx(257 * 0.00025 + 257**2 / 2 * 1e-6 + 0.001)
    vision, language = work(costs(attention=1e-6), load(repeated=1.0))
    assert (vision, language) == (0, pytest.approx(257 * 0.00025 + 257**2 / 2 * 1e-6 + 0.001))


def test_a_request_costs_its_share_once_however_long_it_is_read() -> None:
    outcome = simulate(costs(request=0.5, step_tokens=64), load(), Fleet(), requests=20)
    assert ttft(outcome) == pytest.approx(0.001 + 0.1 + 257 * 0.00025 + 0.001 + 0.5)


def test_text_needs_no_vision_worker() -> None:
    outcome = simulate(costs(), load(images=0, text=100), Fleet(), requests=20)
    assert ttft(outcome) == pytest.approx(100 * 0.00025 + 0.001)


def test_compressed_tiles_are_read_faster_and_not_seen_faster() -> None:
    plain, small = (simulate(costs(), load(compressed=share), Fleet(), requests=20) for share in (0.0, 1.0))
    assert ttft(plain) - ttft(small) == pytest.approx((256 - 64) * 0.00025)


def test_a_long_prompt_is_read_in_parts() -> None:
    outcome = simulate(costs(step_tokens=1000, step=0.01), load(images=0, text=2500), Fleet(), requests=10)
    assert ttft(outcome) == pytest.approx(2500 * 0.00025 + 3 * 0.01 + 0.001)


def test_saturated_throughput_is_that_of_the_slowest_stage() -> None:
    """100 ms of vision, 65 ms of language, one beside the other or one after the other."""
    apart = simulate(costs(), load(), Fleet(), requests=200, in_flight=16)
    assert apart.throughput == pytest.approx(10, rel=0.02)
    assert apart.bottleneck == "vision"
    together = simulate(costs(), load(), COLOCATED, requests=200, in_flight=16)
    assert together.throughput == pytest.approx(1 / 0.16525, rel=0.02)
    two = simulate(costs(), load(), Fleet(vision=2), requests=200, in_flight=16)
    assert two.bottleneck == "language"
    assert two.throughput == pytest.approx(1 / 0.06525, rel=0.03)


def test_work_is_what_saturation_shows() -> None:
    vision, language = work(costs(), load(images=2, tiles=3, output=10))
    assert vision == pytest.approx(0.6)
    assert language == pytest.approx((6 * 256 + 1) * 0.00025 + 10 * 0.001)


def test_answers_feel_images_only_where_both_share_a_worker() -> None:
    """While one speaks, images of others come: between two of its tokens lies a whole encode, or a part of a prompt."""
    mixed = Load(rate=4, kinds=[Kind(images=0, output=300, weight=1), Kind(images=1, tiles=1, output=1, weight=1)])
    gaps = {}
    for name, fleet in (("apart", Fleet()), ("together", COLOCATED)):
        gaps[name] = percentile(simulate(costs(prefill=0.00002, step=0.001), mixed, fleet, requests=200).itl, 0.99)
    assert gaps["together"] > 5 * gaps["apart"]


def test_a_narrow_network_is_the_bottleneck() -> None:
    outcome = simulate(costs(network=256_000 / 0.2), load(), Fleet(), requests=100, in_flight=16)
    assert outcome.bottleneck == "network"
    assert outcome.throughput == pytest.approx(5, rel=0.03)
    assert outcome.network == pytest.approx(256_000 / 0.2, rel=0.05)


def test_the_same_seed_is_the_same_run() -> None:
    one, again, other = (simulate(costs(), load(rate=5), Fleet(), requests=50, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_waiting_grows_with_the_rate() -> None:
    slow, fast = (ttft(simulate(costs(), load(rate=rate), Fleet(), requests=400)) for rate in (2, 9))
    assert fast > 1.3 * slow


def test_every_request_is_answered_in_full() -> None:
    kinds = [Kind(images=0, output=3), Kind(images=3, tiles=2, output=7, weight=2), Kind(images=1, tiles=13, repeated=0.5)]
    outcome = simulate(costs(batch_tiles=5, cores=3), Load(rate=3, kinds=kinds), Fleet(vision=2, language=2), requests=120)
    assert len(outcome.ttft) == 120
    assert all(gap >= 0 for gap in outcome.itl)
    assert all(0 <= share <= 1.000001 for share in outcome.busy.values())


def test_requests_that_end_in_waves_count_by_their_parts() -> None:
    """Sixteen at once, all alike, end nearly together: whole ones would count none or sixteen of a window's last wave."""
    rates = [simulate(costs(), load(), Fleet(vision=8), requests=n, in_flight=16).throughput for n in range(60, 76, 4)]
    assert max(rates) / min(rates) < 1.05
