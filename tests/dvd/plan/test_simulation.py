"""The simulation against results that can be computed by hand."""

import pytest

from dvd.plan.model import Costs, Fleet, Kind, LanguageCosts, Load, VisionCosts, work
from dvd.plan.simulation import Outcome, percentile, simulate


def costs(**changed: float) -> Costs:
    """Costs of 100 ms per tile, 64 ms per 256 tokens of prefill and 1 ms per output token."""
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


def test_a_single_request_takes_the_sum_of_its_stages() -> None:
    outcome = simulate(costs(), load(), Fleet(), requests=20)
    assert ttft(outcome) == pytest.approx(0.001 + 0.1 + 257 * 0.00025 + 0.001)
    assert outcome.itl == []


def test_a_single_colocated_request_takes_as_long() -> None:
    assert ttft(simulate(costs(), load(), COLOCATED, requests=20)) == pytest.approx(
        ttft(simulate(costs(), load(), Fleet(), requests=20))
    )


def test_images_are_prepared_on_all_cores_and_encoded_in_batches() -> None:
    outcome = simulate(costs(cores=2, batch_tiles=4, batch=0.02), load(images=2, tiles=3), Fleet(), requests=10)
    prompt = 2 * 3 * 256 + 1
    # both images are prepared after 3 ms; six tiles make two batches, of three and three or of four and two
    assert ttft(outcome) == pytest.approx(0.003 + 6 * 0.1 + 2 * 0.02 + prompt * 0.00025 + 0.001)


def test_a_stored_embedding_is_not_encoded_again() -> None:
    outcome = simulate(costs(), load(repeated=1.0), Fleet(), requests=20)
    assert ttft(outcome) == pytest.approx(257 * 0.00025 + 0.001)
    assert outcome.busy["vision"] == outcome.network == 0


@pytest.mark.parametrize("step_tokens", [64, 100, 4096])
def test_attention_cost_does_not_depend_on_the_number_of_steps(step_tokens: int) -> None:
    outcome = simulate(costs(attention=1e-6, step_tokens=step_tokens), load(repeated=1.0), Fleet(), requests=20)
    assert ttft(outcome) == pytest.approx(257 * 0.00025 + 257**2 / 2 * 1e-6 + 0.001)
    vision, language = work(costs(attention=1e-6), load(repeated=1.0))
    assert vision == 0
    assert language == pytest.approx(257 * 0.00025 + 257**2 / 2 * 1e-6 + 0.001)


def test_the_cost_per_request_is_paid_once() -> None:
    outcome = simulate(costs(request=0.5, step_tokens=64), load(), Fleet(), requests=20)
    assert ttft(outcome) == pytest.approx(0.001 + 0.1 + 257 * 0.00025 + 0.001 + 0.5)


def test_text_needs_no_vision_worker() -> None:
    outcome = simulate(costs(), load(images=0, text=100), Fleet(), requests=20)
    assert ttft(outcome) == pytest.approx(100 * 0.00025 + 0.001)


def test_compression_shortens_prefill_and_not_encoding() -> None:
    plain, small = (simulate(costs(), load(compressed=share), Fleet(), requests=20) for share in (0.0, 1.0))
    assert ttft(plain) - ttft(small) == pytest.approx((256 - 64) * 0.00025)


def test_a_long_prompt_is_prefilled_in_chunks() -> None:
    outcome = simulate(costs(step_tokens=1000, step=0.01), load(images=0, text=2500), Fleet(), requests=10)
    assert ttft(outcome) == pytest.approx(2500 * 0.00025 + 3 * 0.01 + 0.001)


def test_saturated_throughput_is_that_of_the_slowest_stage() -> None:
    """100 ms of vision and 65 ms of language, in parallel if decoupled and in sequence if colocated."""
    decoupled = simulate(costs(), load(), Fleet(), requests=200, in_flight=16)
    assert decoupled.throughput == pytest.approx(10, rel=0.02)
    assert decoupled.bottleneck == "vision"
    colocated = simulate(costs(), load(), COLOCATED, requests=200, in_flight=16)
    assert colocated.throughput == pytest.approx(1 / 0.16525, rel=0.02)
    two = simulate(costs(), load(), Fleet(vision=2), requests=200, in_flight=16)
    assert two.bottleneck == "language"
    assert two.throughput == pytest.approx(1 / 0.06525, rel=0.03)


def test_work_is_the_sum_of_the_costs() -> None:
    vision, language = work(costs(), load(images=2, tiles=3, output=10))
    assert vision == pytest.approx(0.6)
    assert language == pytest.approx((6 * 256 + 1) * 0.00025 + 10 * 0.001)


def test_images_delay_running_answers_only_if_colocated() -> None:
    """While one request decodes, others arrive with images: a whole encode, or a chunk of a prompt, delays its next token."""
    mixed = Load(rate=4, kinds=[Kind(images=0, output=300, weight=1), Kind(images=1, tiles=1, output=1, weight=1)])
    itl = {}
    for name, fleet in (("decoupled", Fleet()), ("colocated", COLOCATED)):
        itl[name] = percentile(simulate(costs(prefill=0.00002, step=0.001), mixed, fleet, requests=200).itl, 0.99)
    assert itl["colocated"] > 5 * itl["decoupled"]


def test_a_narrow_network_is_the_bottleneck() -> None:
    outcome = simulate(costs(network=256_000 / 0.2), load(), Fleet(), requests=100, in_flight=16)
    assert outcome.bottleneck == "network"
    assert outcome.throughput == pytest.approx(5, rel=0.03)
    assert outcome.network == pytest.approx(256_000 / 0.2, rel=0.05)


def test_the_same_seed_gives_the_same_outcome() -> None:
    first, second, other = (simulate(costs(), load(rate=5), Fleet(), requests=50, seed=seed) for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_latency_grows_with_the_rate() -> None:
    slow, fast = (ttft(simulate(costs(), load(rate=rate), Fleet(), requests=400)) for rate in (2, 9))
    assert fast > 1.3 * slow


def test_every_request_completes() -> None:
    kinds = [Kind(images=0, output=3), Kind(images=3, tiles=2, output=7, weight=2), Kind(images=1, tiles=13, repeated=0.5)]
    outcome = simulate(costs(batch_tiles=5, cores=3), Load(rate=3, kinds=kinds), Fleet(vision=2, language=2), requests=120)
    assert len(outcome.ttft) == 120
    assert all(gap >= 0 for gap in outcome.itl)
    assert all(0 <= share <= 1.000001 for share in outcome.busy.values())


def test_requests_count_by_their_share_in_the_window() -> None:
    """Sixteen equal requests complete nearly together: whole requests would count none or all of the last wave of a window."""
    rates = [simulate(costs(), load(), Fleet(vision=8), requests=n, in_flight=16).throughput for n in range(60, 76, 4)]
    assert max(rates) / min(rates) < 1.05
