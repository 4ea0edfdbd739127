"""Settings come from the environment and go to other processes by it."""

from pathlib import Path

import pydantic
import pytest

from toile.core.settings import Settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("TOILE_"):
            monkeypatch.delenv(name)


def test_defaults_live_under_home(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    assert settings.resolved_catalog_url == f"sqlite:///{tmp_path}/catalog.db"
    assert settings.resolved_artifacts_url == f"file://{tmp_path}/artifacts"


def test_nested_settings_have_two_underscores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOILE_S3__ENDPOINT", "store:9000")
    monkeypatch.setenv("TOILE_LIMITS__STEPS", "7")
    settings = Settings()
    assert settings.s3.endpoint == "store:9000"
    assert settings.limits.steps == 7


def test_another_process_gets_the_very_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(
        home=tmp_path,
        port=123,
        ready_file=tmp_path / "ready",
        log_level="debug",
        s3={"endpoint": "e", "secret_key": "s", "secure": False},  # type: ignore[arg-type]
        limits={"steps": 9},  # type: ignore[arg-type]
        kuberay={"template": "rayjob.yaml", "queue": "designers"},  # type: ignore[arg-type]
        wandb={"project": "lace", "mode": "offline"},  # type: ignore[arg-type]
    )
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings


def test_secrets_are_not_shown() -> None:
    settings = Settings(s3={"secret_key": "hush"})  # type: ignore[arg-type]
    assert "hush" not in repr(settings)
    assert settings.environment()["TOILE_S3__SECRET_KEY"] == "hush"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOILE_GRACE_SECONDS", "0"),
        ("TOILE_LOG_LEVEL", "loud"),
        ("TOILE_LIMITS__STEPS", "-1"),
        ("TOILE_PORT", "http"),
    ],
)
def test_a_bad_value_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(pydantic.ValidationError):
        Settings()


def test_every_setting_says_what_it_is() -> None:
    for model in (
        Settings,
        *(type(v) for v in (Settings().s3, Settings().limits, Settings().kuberay)),
    ):
        for name, field in model.model_fields.items():
            nested = isinstance(getattr(Settings(), name, None), pydantic.BaseModel)
            assert nested or field.description, f"{model.__name__}.{name}"


def test_settings_do_not_change() -> None:
    settings = Settings()
    with pytest.raises(pydantic.ValidationError):
        settings.port = 1


def test_secrets_are_told_from_the_rest() -> None:
    settings = Settings(
        catalog_url="postgresql+psycopg://toile:hush@database/toile",
        ray_auth_token="hush",  # type: ignore[arg-type]
        s3={"endpoint": "e", "access_key": "hush", "secret_key": "hush"},  # type: ignore[arg-type]
    )
    told = {name for name, value in settings.environment().items() if "hush" in value}
    assert told == settings.secret_names()
