"""Text encoders that are trained with the UNet."""

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor, nn

from toile.diffusion.bundle import Bundle
from toile.training import batches, caches, lora
from toile.training.batches import loss_sum, make_batch
from toile.training.data import Example
from toile.training.optimizers import make_optimizer, set_rate
from toile.training.state import RunState
from toile.training.texts import ReadingUNet, caption_tokens
from unit.training.runs import (
    TEXT_CONFIG,
    Run,
    made_up_tokens,
    small_text_encoders,
    small_unet,
    tokens_of,
)


@pytest.fixture
def network() -> ReadingUNet:
    return lora.with_text_encoders(small_unet(), small_text_encoders(), TEXT_CONFIG, tokens_of())


def test_tokens_are_read_as_the_pipelines_embed_prompts(tiny_bundle: Path) -> None:
    bundle = Bundle.load(tiny_bundle)
    network = ReadingUNet(bundle.unet, bundle.text_encoders, caption_tokens(bundle, ""))
    for caption in (None, "a lace (dress)", "BREAK " + "dress " * 90):
        embeds, pooled = caches._encode_caption(bundle, caption, as_tokens=False)
        tokens, nothing = caches._encode_caption(bundle, caption, as_tokens=True)
        assert (tokens.shape, nothing.shape) == ((1, 2, 77), (1, 0))
        read, read_pooled = network.read(tokens)
        assert torch.allclose(read, embeds, atol=1e-6)
        assert torch.allclose(read_pooled, pooled, atol=1e-6)
        # The empty one is what guidance pushes away from, which this base wants as zeros.
        assert bool(read.any()) is bool(read_pooled.any()) is (caption is not None)


def test_a_base_that_embeds_the_empty_prompt_has_it_read(tiny_bundle: Path) -> None:
    bundle = Bundle.load(tiny_bundle)
    embeds, pooled = ReadingUNet(bundle.unet, bundle.text_encoders, None).read(
        caption_tokens(bundle, "")[None]
    )
    plain = bundle.encode_prompt("")
    assert torch.allclose(embeds, plain.prompt, atol=1e-6)
    assert torch.allclose(pooled, plain.pooled, atol=1e-6)


def test_captions_are_not_embedded_for_the_cache(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = []
    for name, caption in (("a", "a dress"), ("b", "a hat"), ("c", "a dress"), ("d", "a coat")):
        Image.new("RGB", (128, 128)).save(tmp_path / f"{name}.png")
        examples.append(Example(tmp_path / f"{name}.png", f"{name}.png", caption, name))
    bundle = Bundle.load(tiny_bundle, digest="base")
    embedded = caches.encoded(bundle, examples)
    monkeypatch.delattr(Bundle, "encode_prompt")
    shards = [
        caches.encode(bundle, examples, places, lambda *_: None, as_tokens=True)
        for places in (range(3), range(3, 4))
    ]
    tokens = caches.Cache(**caches.joined_shards(shards))
    assert torch.allclose(tokens.means, embedded.means, atol=1e-6)
    assert tokens.captions.tolist() == embedded.captions.tolist() == [1, 2, 1, 3]
    assert tokens.pooled.shape == (4, 0)
    assert tokens.embeds.tolist() == [
        caption_tokens(bundle, caption).tolist() for caption in ("", "a dress", "a hat", "a coat")
    ]


def test_all_that_is_trained_gets_gradients_though_every_caption_is_dropped(
    network: ReadingUNet, scheduler: DDPMScheduler
) -> None:
    """A rank waits for the gradient of each parameter that it was told of."""
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    assert {name.partition(".")[0] for name in trained} == {"unet", *small_text_encoders()}
    config = TEXT_CONFIG.model_copy(update={"caption_dropout": 1.0})
    batch = make_batch(made_up_tokens(), [0, 1], config, 0, scheduler)
    assert torch.equal(batch.embeds, torch.stack([tokens_of()] * 2))
    time_ids = torch.tensor([[128.0, 128, 0, 0, 128, 128]])
    loss_sum(network, batch, scheduler, config, time_ids).backward()
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    of_text = [p.grad for n, p in trained.items() if n.startswith("text")]
    assert not any(gradient.any() for gradient in of_text if gradient is not None)


def test_it_learns_in_the_encoders_and_changes_nothing_else(scheduler: DDPMScheduler) -> None:
    before = {
        f"{part}.{name}": tensor.clone()
        for part, encoder in small_text_encoders().items()
        for name, tensor in encoder.state_dict().items()
    }
    run = Run(small_unet(), made_up_tokens(), scheduler, TEXT_CONFIG)
    after = {n.replace(".base_layer", ""): t for n, t in run.network.state_dict().items()}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    state = lora.adapter_state(run.network)
    of_text = {name: tensor for name, tensor in state.items() if name.startswith("text_encoder")}
    linears = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in of_text}
    assert linears == set(lora.TEXT_TARGETS)
    assert all(tensor.any() for name, tensor in of_text.items() if "lora_B" in name)
    layers = {name.partition(".self_attn")[0] for name in of_text}
    assert layers == {
        "text_encoder.encoder.layers.0",  # what is read of it ends there
        "text_encoder_2.text_model.encoder.layers.0",
        "text_encoder_2.text_model.encoder.layers.1",
    }


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_text_encoders_step_at_their_own_rate(optimizer: str) -> None:
    config = TEXT_CONFIG.model_copy(
        update={"optimizer": optimizer, "learning_rate": 0.1, "text_encoder_learning_rate": 0.025}
    )
    network = nn.ModuleDict({"unet": nn.Linear(4, 4), "text_encoder_2": nn.Linear(4, 4)})
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    state = RunState(network, config.model_copy(update={"weight_decay": 0.0}))
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert state.advance(0.01, 1.0) == 0.01
    moved = {
        name: float((before[name] - parameter.detach()).abs().max())
        for name, parameter in network.named_parameters()
    }
    assert moved["unet.weight"] == pytest.approx(0.01, rel=1e-3)
    assert moved["text_encoder_2.weight"] == pytest.approx(0.0025, rel=1e-3)


def test_prodigy_finds_one_rate_for_all() -> None:
    config = TEXT_CONFIG.model_copy(
        update={"optimizer": "prodigy", "learning_rate": 1.0, "text_encoder_learning_rate": None}
    )
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = make_optimizer(config, [one], [other])
    set_rate(optimizer, 0.5)
    for parameter in (one, other):
        parameter.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(one, other)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_dropout_reaches_the_encoders_and_tells_them_apart(scheduler: DDPMScheduler) -> None:
    config = TEXT_CONFIG.model_copy(update={"dropout": 0.5})
    network = lora.with_text_encoders(small_unet(), small_text_encoders(), config, None)
    dropouts = [m for m in network.text_encoder_2.modules() if isinstance(m, lora.ImageDropout)]
    assert len(dropouts) == 8
    hidden = torch.ones(1, 64)
    masks: list[Tensor] = []
    for dropout in dropouts[:2]:
        dropout.places = [0]
        masks.append(dropout(hidden))
    assert not torch.equal(*masks)


def test_pieces_add_up_to_the_batch(
    scheduler: DDPMScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "cpu_has_bfloat16", lambda: False)
    whole = Run(small_unet(), made_up_tokens(), scheduler, TEXT_CONFIG)
    config = TEXT_CONFIG.model_copy(
        update={"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    )
    pieces = Run(small_unet(), made_up_tokens(), scheduler, config)
    assert whole.end.losses == pytest.approx(pieces.end.losses, abs=1e-5)
