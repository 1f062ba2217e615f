"""The reconstructor, and AV and AR on disk."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYER, copy_av, same_weights, tiny_model, weights_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from inbrief.io.errors import InbriefError
from inbrief.metrics import direction_mse
from inbrief.models import checkpoints
from inbrief.models.reconstructor import Reconstructor
from inbrief.models.verbalizer import Verbalizer
from inbrief.training.steps import adamw, guarded_step

TEXTS = ["A fox.", "Mara, a brave baker, stood at the harbour in rainy weather.", "x", "Object: a red lantern <"]
CHECKPOINT = HealthCheck.function_scoped_fixture


def prompt_by_hand(ar: Reconstructor, text: str) -> list[int]:
    return ar.tokenizer(f"Summary of the following text: <text>{text.strip()}</text> <summary>")["input_ids"]


# The forward pass


def test_T40_an_untrained_ar_reads_the_targets_block_k_bit_for_bit(target, new_ar):
    ar = new_ar()
    for text in TEXTS:
        ids = torch.tensor([prompt_by_hand(ar, text)])
        with torch.no_grad():
            state = target(input_ids=ids, output_hidden_states=True).hidden_states[LAYER + 1][0, -1]
            read = ar.backbone(input_ids=ids).last_hidden_state[0, -1]
            prediction = ar([ids[0].tolist()])[0]
        assert torch.equal(read, state)
        assert torch.allclose(prediction, state * 128**0.5 / state.norm(), atol=1e-5)


def test_T40_an_ar_has_k_plus_one_blocks_and_no_final_norm(target, new_ar):
    ar = new_ar()
    assert len(ar.backbone.layers) == LAYER + 1
    assert isinstance(ar.backbone.norm, nn.Identity)
    assert ar.backbone.config.num_hidden_layers == LAYER + 1
    assert len(ar.backbone.config.layer_types) == LAYER + 1
    assert target.config.num_hidden_layers == len(target.config.layer_types) == 4


def test_T34_an_ar_shares_no_weight_with_the_target(target, new_ar):
    before = weights_of(target)
    ar = new_ar()
    with torch.no_grad():
        for p in ar.parameters():
            p.add_(1)
    assert same_weights(weights_of(target), before)


def test_scaling_the_hidden_state_before_the_head_changes_no_direction(new_ar):
    ar = new_ar()
    nn.init.normal_(ar.head.weight)
    rows = ar.prompts(TEXTS)
    with torch.no_grad():
        found = ar(rows)
        raw = torch.stack([ar.head(ar.backbone(input_ids=torch.tensor([r])).last_hidden_state[0, -1]) for r in rows])
    assert torch.allclose(direction_mse(found, raw), torch.zeros(4), atol=1e-5)


@settings(max_examples=15, deadline=None, suppress_health_check=[CHECKPOINT])
@given(texts=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=6), room=st.integers(1, 300))
def test_T18_batched_prediction_equals_single_prediction(new_ar, texts, room):
    ar = new_ar()
    together = ar.predict(texts, max_tokens=room)
    with torch.no_grad():
        alone = torch.stack([ar([prompt_by_hand(ar, t)])[0] for t in texts])
    assert torch.allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_T18_the_tokenizers_padding_side_does_not_matter(new_ar, side):
    ar = new_ar()
    before = ar.predict(TEXTS)
    ar.tokenizer = deepcopy(ar.tokenizer)
    ar.tokenizer.padding_side = side
    assert torch.equal(ar.predict(TEXTS), before)


def test_T14_warm_start_reward_and_evaluation_read_one_prompt(new_ar):
    ar = new_ar()
    texts = ["  a fox\n", "{}", "</text>", "{explanation}"]
    assert ar.prompts(texts) == [prompt_by_hand(ar, t) for t in texts]


def test_T13_the_ar_prompt_has_one_bos_where_special_tokens_are_on(new_ar):
    ar = new_ar()
    asked = []

    def tokenizer(texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        asked.append(add_special_tokens)
        return {"input_ids": [[1] * add_special_tokens + [5, 6] for _ in texts]}

    ar.tokenizer = tokenizer
    assert ar.prompts(["x"]) == [[1, 5, 6]]
    ar.contract = ar.contract.model_copy(update={"ar_special_tokens": False})
    assert ar.prompts(["x"]) == [[5, 6]]
    assert asked == [True, False]


def test_T17_an_over_long_prompt_is_an_error_never_cut(new_ar):
    ar = new_ar()
    fixed = len(prompt_by_hand(ar, "key")) - 1
    fits = " ".join(["key"] * (ar.MAX_TOKENS - fixed))
    assert len(ar.prompts([fits])[0]) == ar.MAX_TOKENS
    with pytest.raises(InbriefError, match="must not exceed"):
        ar.prompts(["short", fits + " key"])


def test_no_texts_give_no_predictions(new_ar):
    assert new_ar().predict([]).shape == (0, 128)


# Learning


def learn_once(ar: Reconstructor, lr: float) -> torch.Tensor:
    target = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    direction_mse(ar(ar.prompts(TEXTS)), target).mean().backward()
    assert guarded_step(adamw(ar, lr), lr, 1.0) is not None
    return ar.head.weight.detach().float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_T41_the_head_learns_on_and_off_its_diagonal(new_ar, dtype):
    ar = new_ar()
    ar.backbone.to(dtype)
    moved = learn_once(ar, 1e-4) - torch.eye(128)
    assert float(moved.diagonal().abs().gt(0).float().mean()) > 0.9
    assert float(moved.abs().gt(0).float().mean()) > 0.9


# On disk


@pytest.fixture
def saved_ar(new_ar, tmp_path):
    ar = new_ar()
    learn_once(ar, 1e-2)
    checkpoints.save_reconstructor(ar, tmp_path / "ar")
    return ar, tmp_path / "ar"


@pytest.fixture
def saved_av(target, tokenizer, contract, tmp_path):
    av = Verbalizer(deepcopy(target), tokenizer, contract)
    with torch.no_grad():
        av.model.model.norm.weight.mul_(1.5)
    checkpoints.save_verbalizer(av, tmp_path / "av")
    return av, tmp_path / "av"


def test_T36_an_ar_survives_the_disk_bit_for_bit(saved_ar):
    ar, folder = saved_ar
    back = checkpoints.load_reconstructor(folder)
    assert same_weights(weights_of(back), weights_of(ar))
    assert back.contract == ar.contract
    assert torch.equal(back.predict(TEXTS), ar.predict(TEXTS))


def test_T36_an_av_survives_the_disk_bit_for_bit(saved_av, vectors):
    av, folder = saved_av
    back = checkpoints.load_verbalizer(folder)
    assert same_weights(weights_of(back), weights_of(av))
    assert back.model.lm_head.weight is back.model.model.embed_tokens.weight
    assert (back.contract, back.prefix, back.suffix) == (av.contract, av.prefix, av.suffix)
    answer = [av.answer_ids("a fox")]
    with torch.no_grad():
        assert torch.equal(back.logprobs(vectors[:1], answer), av.logprobs(vectors[:1], answer))


@pytest.mark.parametrize("tied", [True, False])
def test_T36_tied_and_untied_heads_survive(tokenizer, contract, tmp_path, tied):
    own = contract.model_copy(update={"d_model": 32, "layer": 1})
    av = Verbalizer(tiny_model("qwen3", len(tokenizer), tied=tied), tokenizer, own)
    checkpoints.save_verbalizer(av, tmp_path / "av")
    assert ("lm_head.weight" in load_file(tmp_path / "av" / checkpoints.WEIGHTS)) != tied
    assert same_weights(weights_of(checkpoints.load_verbalizer(tmp_path / "av")), weights_of(av))


def test_T40_an_ar_on_disk_has_the_released_layout(saved_ar):
    ar, folder = saved_ar
    state = load_file(folder / checkpoints.WEIGHTS)
    assert not {"model.norm.weight", "lm_head.weight"} & state.keys()
    assert {k.split(".")[2] for k in state if k.startswith("model.layers.")} == {"0", "1", "2"}
    head = load_file(folder / checkpoints.HEAD)
    assert list(head) == ["weight"]
    assert torch.equal(head["weight"], ar.head.weight.detach())
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == len(config["layer_types"]) == LAYER + 1


def test_T40_a_plain_loader_reads_the_same_hidden_states(saved_ar):
    ar, folder = saved_ar
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    plain.model.norm = nn.Identity()
    row = prompt_by_hand(ar, TEXTS[1])
    with torch.no_grad():
        hidden = plain.model(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
        head = load_file(folder / checkpoints.HEAD)["weight"]
        assert float(direction_mse(head @ hidden, ar([row])[0])) < 1e-5


def test_T38_saving_leaves_a_model_bit_equal_and_trainable(saved_ar, saved_av, tmp_path):
    for module, save in ((saved_ar[0], checkpoints.save_reconstructor), (saved_av[0], checkpoints.save_verbalizer)):
        module.train()
        before = weights_of(module)
        save(module, tmp_path / "again")
        save(module, tmp_path / "half", torch.bfloat16)
        assert same_weights(weights_of(module), before)
        assert module.training
        assert all(p.requires_grad and p.dtype == torch.float32 for p in module.parameters())


def test_T38_saving_again_replaces_the_checkpoint_whole(saved_ar):
    ar, folder = saved_ar
    (folder / "stray").write_text("x")
    with torch.no_grad():
        ar.head.weight.mul_(2)
    checkpoints.save_reconstructor(ar, folder)
    assert not (folder / "stray").exists()
    assert torch.equal(checkpoints.load_reconstructor(folder).head.weight, ar.head.weight)


def test_half_precision_on_disk_halves_the_weights(saved_ar, tmp_path):
    ar, folder = saved_ar
    checkpoints.save_reconstructor(ar, tmp_path / "half", torch.bfloat16)
    sizes = [(f / checkpoints.WEIGHTS).stat().st_size for f in (folder, tmp_path / "half")]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.05)
    back = checkpoints.load_reconstructor(tmp_path / "half")
    assert back.head.weight.dtype == torch.float32
    assert torch.equal(back.head.weight, ar.head.weight.bfloat16().float())


@pytest.mark.parametrize("kind", ["ar", "av"])
@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_T39_missing_extra_and_misshapen_tensors_are_refused(saved_ar, saved_av, kind, change):
    folder = {"ar": saved_ar, "av": saved_av}[kind][1]
    path = folder / checkpoints.WEIGHTS
    state = load_file(path)
    if change == "missing":
        del state["model.layers.1.mlp.up_proj.weight"]
    elif change == "extra":
        state["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    else:
        state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(2, 2)
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(InbriefError, match=r"must hold exactly|does not fit"):
        {"ar": checkpoints.load_reconstructor, "av": checkpoints.load_verbalizer}[kind](folder)


def test_T39_an_ar_never_starts_with_a_random_head(saved_ar):
    _, folder = saved_ar
    (folder / checkpoints.HEAD).unlink()
    with pytest.raises(InbriefError, match="incomplete"):
        checkpoints.load_reconstructor(folder)
    save_file({"head": torch.eye(128)}, folder / checkpoints.HEAD)
    with pytest.raises(InbriefError, match="must hold exactly"):
        checkpoints.load_reconstructor(folder)


def test_T39_a_final_norm_in_an_ar_is_refused(saved_ar):
    _, folder = saved_ar
    state = load_file(folder / checkpoints.WEIGHTS)
    save_file({**state, "model.norm.weight": torch.ones(128)}, folder / checkpoints.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(InbriefError, match=r"norm\.weight"):
        checkpoints.load_reconstructor(folder)


def test_T39_an_untied_checkpoint_without_its_head_is_refused(tokenizer, contract, tmp_path):
    own = contract.model_copy(update={"d_model": 32, "layer": 1})
    checkpoints.save_verbalizer(
        Verbalizer(tiny_model("qwen3", len(tokenizer), tied=False), tokenizer, own), tmp_path / "av"
    )
    path = tmp_path / "av" / checkpoints.WEIGHTS
    state = load_file(path)
    del state["lm_head.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(InbriefError, match=r"lm_head\.weight"):
        checkpoints.load_verbalizer(tmp_path / "av")


def test_T39_a_file_cut_short_is_refused(saved_ar):
    _, folder = saved_ar
    path = folder / checkpoints.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InbriefError, match="cut short"):
        checkpoints.load_reconstructor(folder)


def test_T40_a_block_count_other_than_k_plus_one_is_refused(saved_ar, contract):
    _, folder = saved_ar
    contract.model_copy(update={"layer": LAYER - 1}).save(folder)
    with pytest.raises(InbriefError, match="2 blocks"):
        checkpoints.load_reconstructor(folder)


@pytest.mark.parametrize("change", [{"marker_id": 5}, {"tokenizer_sha": "0" * 16}, {"left_id": 1}])
def test_T1_a_checkpoint_whose_contract_does_not_fit_its_tokenizer_is_refused(saved_av, contract, change):
    _, folder = saved_av
    contract.model_copy(update=change).save(folder)
    with pytest.raises(InbriefError):
        checkpoints.load_verbalizer(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InbriefError, match="does not exist"):
        checkpoints.load_reconstructor(tmp_path / "nothing")


def test_a_pickled_checkpoint_is_never_opened(saved_av):
    av, folder = saved_av
    (folder / checkpoints.WEIGHTS).unlink()
    torch.save(av.model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(InbriefError):
        checkpoints.load_verbalizer(folder)
    with pytest.raises(InbriefError, match="No model could be loaded"):
        checkpoints.load_target(str(folder))


@pytest.mark.parametrize("path", ["./nothing", "/nothing/here", "no-such-name", "a/b/c"])
def test_a_target_that_is_nowhere_is_an_error_for_the_user(path):
    with pytest.raises(InbriefError, match=r"model\.path"):
        checkpoints.load_target(path)


def altered_target(tmp_path: Path, config: dict[str, Any] | None = None, drop: str = "") -> str:
    folder = tmp_path / "target"
    shutil.copytree(checkpoints.built_in(), folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    state = load_file(folder / checkpoints.WEIGHTS)
    state.pop(drop, None)
    save_file(state, folder / checkpoints.WEIGHTS, metadata={"format": "pt"})
    return str(folder)


def test_T39_a_target_with_a_missing_tensor_is_refused(tmp_path):
    with pytest.raises(InbriefError):
        checkpoints.load_target(altered_target(tmp_path, drop="model.layers.1.mlp.up_proj.weight"))


def test_T39_a_target_with_an_extra_tensor_is_refused(tmp_path):
    with pytest.raises(InbriefError):
        checkpoints.load_target(
            altered_target(tmp_path, {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3})
        )


def test_T39_a_target_with_a_misshapen_tensor_is_refused(tmp_path):
    with pytest.raises(InbriefError):
        checkpoints.load_target(altered_target(tmp_path, {"intermediate_size": 200}))


def test_an_unregistered_architecture_says_where_to_add_it(tmp_path):
    config = GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "other")
    with pytest.raises(InbriefError, match="REGISTRY"):
        checkpoints.load_target(str(tmp_path / "other"))


def test_copies_of_an_av_share_nothing(warm_av):
    first = warm_av()
    second = copy_av(first)
    with torch.no_grad():
        second.model.model.norm.weight.add_(1)
    assert not same_weights(weights_of(first), weights_of(second))
