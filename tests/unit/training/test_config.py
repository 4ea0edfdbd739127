"""What a recipe can be told."""

import pytest

from toile.core.errors import InvalidArgumentError
from toile.train.convert import recipe_message, recipe_values
from toile.training.config import ControlNetRecipeConfig, LoraRecipeConfig
from toile.v1 import train_pb2


def test_alpha_follows_the_rank_unless_given() -> None:
    assert LoraRecipeConfig.checked({"rank": 8}).scale == 1.0
    assert LoraRecipeConfig.checked({"rank": 8, "alpha": 4}).scale == 0.5


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"rank": 0}, "lora.rank"),
        ({"rank": 65}, "lora.rank"),
        ({"alpha": 0}, "lora.alpha"),
        ({"learning_rate": -1e-3}, "lora.learning_rate"),
        ({"learning_rate": float("nan")}, "lora.learning_rate"),
        ({"steps": 0}, "lora.steps"),
        ({"batch_size": 0}, "lora.batch_size"),
        ({"seed": -1}, "lora.seed"),
        ({"caption_dropout": 1.5}, "lora.caption_dropout"),
        ({"min_snr_gamma": -1}, "lora.min_snr_gamma"),
        ({"checkpoint_interval_steps": 0}, "lora.checkpoint_interval_steps"),
        ({"sample_prompts": ["a dress", ""]}, "lora.sample_prompts.1"),
        ({"sample_prompts": ["a"] * 9}, "lora.sample_prompts"),
        ({"epochs": 3}, "lora.epochs"),
        ({"learning_rate_schedule": "step"}, "lora.learning_rate_schedule"),
        ({"steps": 10, "warmup_steps": 11}, "lora.warmup_steps"),
        ({"noise_offset": 1.5}, "lora.noise_offset"),
        ({"huber_c": -1}, "lora.huber_c"),
        ({"batch_size": 2, "gradient_accumulation_steps": 3}, "lora.gradient_accumulation_steps"),
        ({"gradient_checkpointing": "maybe"}, "lora.gradient_checkpointing"),
        ({"ema_decay": 1.0}, "lora.ema_decay"),
        ({"validation_share": 0.6}, "lora.validation_share"),
        ({"validation_interval_steps": 0}, "lora.validation_interval_steps"),
        ({"early_stopping_patience": 2}, "lora.early_stopping_patience"),
        ({"sample_interval_steps": -1}, "lora.sample_interval_steps"),
        ({"publish_weights": "best"}, "lora.publish_weights"),
        ({"publish_weights": "best_samples"}, "lora.publish_weights"),
        ({"optimizer": "sgd"}, "lora.optimizer"),
        ({"weight_decay": -0.1}, "lora.weight_decay"),
        ({"adam_beta1": 1.0}, "lora.adam_beta1"),
        ({"optimizer": "adafactor", "adam_beta2": 0.99}, "lora.adam_beta2"),
        ({"learning_rate": 1.0}, "lora.learning_rate"),
        ({"background_weight": 0.1}, "lora.background_weight"),
        ({"dropout": 1.0}, "lora.dropout"),
        ({"mixed_precision": "fp8"}, "lora.mixed_precision"),
        ({"target_modules": "convolutions"}, "lora.target_modules"),
        ({"masked_loss": True, "background_weight": 1.1}, "lora.background_weight"),
        ({"repeats": {"detail/*": 0}}, "lora.repeats.detail/*"),
        ({"repeats": {"detail/*": 101}}, "lora.repeats.detail/*"),
        ({"repeats": {str(n): 2 for n in range(65)}}, "lora.repeats"),
        ({"learning_rate": 1.0, "optimizer": "adafactor"}, "lora.learning_rate"),
        ({"learning_rate": 11.0, "optimizer": "prodigy"}, "lora.learning_rate"),
        ({"text_encoder_learning_rate": 1e-4}, "lora.text_encoder_learning_rate"),
        (
            {"train_text_encoders": True, "text_encoder_learning_rate": 0.2},
            "lora.text_encoder_learning_rate",
        ),
        (
            {
                "train_text_encoders": True,
                "optimizer": "prodigy",
                "text_encoder_learning_rate": 1e-4,
            },
            "lora.text_encoder_learning_rate",
        ),
        ({"train_text_encoders": True, "use_dora": True}, "lora.use_dora"),
        ({"class_prompt": "a dress"}, "lora.class_image_count"),
        ({"class_prompt": "a dress", "class_image_count": 0}, "lora.class_image_count"),
        ({"class_prompt": "a dress", "class_image_count": 10_001}, "lora.class_image_count"),
        ({"class_image_count": 100}, "lora.class_image_count"),
        ({"class_prompt": " ", "class_image_count": 1}, "lora.class_prompt"),
        ({"prior_loss_weight": 0.5}, "lora.prior_loss_weight"),
        (
            {"class_prompt": "a dress", "class_image_count": 1, "prior_loss_weight": 0},
            "lora.prior_loss_weight",
        ),
    ],
)
def test_mistakes_are_named(values: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        LoraRecipeConfig.checked(values)
    assert caught.value.metadata["field"] == field
    assert field in caught.value.message
    assert caught.value.reason == "BAD_CONFIG"


def test_configuration_survives_json() -> None:
    config = LoraRecipeConfig.checked(
        {"rank": 4, "sample_prompts": ["a dress"], "optimizer": "adafactor"}
    )
    assert LoraRecipeConfig.checked(config.model_dump(mode="json")) == config


def test_a_request_can_say_all_that_the_recipe_knows() -> None:
    assert set(train_pb2.LoraConfig.DESCRIPTOR.fields_by_name) == set(LoraRecipeConfig.model_fields)


def test_configuration_survives_the_message_of_a_version() -> None:
    config = LoraRecipeConfig.checked(
        {
            "learning_rate_schedule": "linear",
            "warmup_steps": 0,
            "gradient_checkpointing": True,
            "validation_share": 0.25,
            "early_stopping_patience": 2,
            "ema_decay": 0.99,
            "repeats": {"detail/*": 4, "look/*": 2},
            "sample_interval_steps": 20,
            "publish_weights": "best_samples",
            "masked_loss": True,
            "background_weight": 0.25,
            "class_prompt": "a dress",
            "class_image_count": 200,
            "prior_loss_weight": 0.5,
        }
    )
    message = recipe_message("lora", config.model_dump(mode="json"))
    assert LoraRecipeConfig.checked(recipe_values(message)) == config


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"control_kind": "depth"}, "controlnet.control_kind"),
        ({"steps": 0}, "controlnet.steps"),
        ({"learning_rate": 0}, "controlnet.learning_rate"),
        ({"caption_dropout": 1.1}, "controlnet.caption_dropout"),
        ({"steps": 10, "warmup_steps": 11}, "controlnet.warmup_steps"),
        ({"optimizer": "adafactor", "adam_beta1": 0.5}, "controlnet.adam_beta1"),
        ({"batch_size": 1, "gradient_accumulation_steps": 2}, "controlnet.gradient_accumulation"),
        ({"early_stopping_patience": 2}, "controlnet.early_stopping_patience"),
        ({"learning_rate": 1.0}, "controlnet.learning_rate"),
        ({"rank": 4}, "controlnet.rank"),
        ({"class_prompt": "a dress"}, "controlnet.class_prompt"),
    ],
)
def test_mistakes_in_a_controlnet_are_named(values: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        ControlNetRecipeConfig.checked(values)
    assert caught.value.metadata["field"].startswith(field)
    assert field in caught.value.message
    assert caught.value.reason == "BAD_CONFIG"


@pytest.mark.parametrize("recipe", [LoraRecipeConfig, ControlNetRecipeConfig])
def test_a_rate_left_out_is_the_optimizers_own(
    recipe: type[LoraRecipeConfig] | type[ControlNetRecipeConfig],
) -> None:
    config = recipe.checked({"optimizer": "prodigy"})
    assert config.learning_rate == 1.0
    assert recipe.checked({"optimizer": "prodigy", "learning_rate": 0.5}).learning_rate == 0.5
    assert recipe.checked(config.model_dump(mode="json")) == config
    assert recipe.checked({"optimizer": "adafactor"}) == recipe(optimizer="adafactor")
    assert recipe.checked({}).learning_rate < 0.01


def test_yamls_false_is_the_word_no() -> None:
    assert LoraRecipeConfig.checked({"mixed_precision": False}).mixed_precision == "no"
    assert ControlNetRecipeConfig.checked({"mixed_precision": "no"}).mixed_precision == "no"


def test_a_step_with_a_class_computes_twice_the_images() -> None:
    assert LoraRecipeConfig(batch_size=6).images_per_step == 6
    config = LoraRecipeConfig(batch_size=6, class_prompt="a dress", class_image_count=1)
    assert config.images_per_step == 12


def test_a_controlnet_learns_to_do_without_captions() -> None:
    assert ControlNetRecipeConfig().caption_dropout == 0.5
    assert LoraRecipeConfig().caption_dropout == 0.1


def test_a_request_can_say_all_that_the_controlnet_recipe_knows() -> None:
    known = set(train_pb2.ControlNetConfig.DESCRIPTOR.fields_by_name)
    assert known == set(ControlNetRecipeConfig.model_fields)


def test_a_controlnet_survives_the_message_of_a_version() -> None:
    config = ControlNetRecipeConfig.checked(
        {"control_kind": "parts", "caption_dropout": 0.0, "warmup_steps": 0, "ema_decay": 0.9}
    )
    message = recipe_message("controlnet", config.model_dump(mode="json"))
    assert ControlNetRecipeConfig.checked(recipe_values(message)) == config


def test_what_is_stored_of_a_lora_is_as_it_always_was() -> None:
    assert list(LoraRecipeConfig().model_dump()) == [
        field.name for field in train_pb2.LoraConfig.DESCRIPTOR.fields
    ]
