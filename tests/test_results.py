"""What the committed results must show, and what the package may weigh."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inbrief.models import checkpoints
from inbrief.storyworld import truth, world

RESULTS = Path(__file__).parent.parent / "docs" / "results"


@pytest.fixture(params=["quickstart", "storyworld"])
def results(request: pytest.FixtureRequest):
    return json.loads((RESULTS / request.param / "results.json").read_text())


def test_the_warm_start_explains_and_reinforcement_lifts_it(results):
    warm = results["warm_start"]
    zero = next(p for p in results["frontier"] if p["lambda"] == 0 and p["scorer"] == "own")
    assert warm["n"] >= 1000 and warm["fve"]["mean"] >= 0.25
    assert zero["delta_fve_warm"]["low"] > 0


def test_some_penalty_saves_a_quarter_of_the_tokens_at_almost_no_loss(results):
    points = [p for p in results["frontier"] if p["scorer"] == "own" and p["lambda"] > 0]
    assert any(p["tokens_saved"]["mean"] >= 0.25 and p["delta_fve"]["low"] >= -0.03 for p in points)


def test_the_largest_penalty_is_far_shorter_and_below_the_warm_start(results):
    last = [p for p in results["frontier"] if p["scorer"] == "own"][-1]
    assert last["tokens"]["mean"] < 0.5 * results["warm_start"]["tokens"]["mean"]
    assert last["delta_fve_warm"]["high"] < 0


def test_controls_stand_where_they_should(results):
    controls = results["controls"]
    assert abs(controls["mean_vector"]["mean"]) < 1e-6
    assert controls["shuffled"]["high"] < 0
    assert controls["shuffled_same_last_token"]["high"] < controls["shuffled_same_last_token_own"]["low"]
    for beside in controls["runs"].values():
        assert beside["shuffled"]["high"] < 0


def test_the_target_carries_what_was_planted_and_nothing_of_what_was_not():
    table = json.loads(Path(str(checkpoints.built_in("acceptance.json"))).read_text())
    assert table["revision"] == checkpoints.revision_of("storyworld")
    for slot, fact in table["facts"].items():
        if world.PLANTING[slot]:
            assert fact["probe_accuracy"] >= 0.9 and fact["false_claim_cost"]["low"] > 0, slot
        else:
            assert fact["probe_accuracy"] < 0.3 and abs(fact["false_claim_cost"]["mean"]) < 0.01, slot
    assert table["ridge_last_4"]["high"] <= 0.5
    assert truth.decodable() == {slot for slot, dose in world.PLANTING.items() if dose}


def test_target_and_pairs_weigh_at_most_12_mb():
    shipped = [
        p for part in ("target", "nla", "warmstart") for p in checkpoints.built_in(part).rglob("*") if p.is_file()
    ]
    assert {"nla", "warmstart"} <= {p.parts[-3] for p in shipped if p.name == "value_head.safetensors"}
    assert sum(p.stat().st_size for p in shipped) <= 12e6
