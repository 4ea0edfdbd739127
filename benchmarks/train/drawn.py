"""Run diffusers' example script on what another training drew: `drawn.py DRAWS OUT SCRIPT …`.

The script then begins with the same adapter, sees the same images in the same order, and draws the
same latents, noise and timesteps. Writes the loss of each step, and the adapter at the end. Runs in
the script's own environment, which has nothing of Toile.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

ADAPTER = "adapter."


class Draws:
    """What each step draws.

    Attributes:
        indices: Images of each step, `[steps, B]`.
        variations: Of the latents about their means, in deviations, `[steps, B, 4, h, w]`.
        noise: `[steps, B, 4, h, w]`.
        timesteps: `[steps, B]`.
        adapter: The adapter to begin with, by the names that files give its weights.
    """

    def __init__(self, file: Path) -> None:
        tensors = load_file(file)
        self.adapter = {
            name.removeprefix(ADAPTER): tensors.pop(name)
            for name in list(tensors)
            if name.startswith(ADAPTER)
        }
        self.indices, self.variations = tensors["indices"], tensors["variations"]
        self.noise, self.timesteps = tensors["noise"], tensors["timesteps"]
        self.step = 0
        self._trained: dict[str, Tensor] = {}

    def install(self) -> None:
        """Put them in place of what the script would draw."""
        add_adapter = UNet2DConditionModel.add_adapter
        order = self.indices.flatten().tolist()

        class InOrder(DataLoader[Any]):
            def __init__(self, dataset: Any, *, shuffle: bool, **options: Any) -> None:
                assert shuffle
                super().__init__(dataset, sampler=order, **options)

        def add(unet: UNet2DConditionModel, *arguments: Any, **options: Any) -> None:
            add_adapter(unet, *arguments, **options)
            self._trained = {
                name.replace(".default", ""): parameter
                for name, parameter in unet.named_parameters()
                if "lora_" in name
            }
            assert self._trained.keys() == self.adapter.keys()
            with torch.no_grad():
                for name, parameter in self._trained.items():
                    parameter.copy_(self.adapter[name])

        torch.utils.data.DataLoader = InOrder  # type: ignore[misc]
        UNet2DConditionModel.add_adapter = add  # type: ignore[method-assign]
        DiagonalGaussianDistribution.sample = self._sample  # type: ignore[method-assign]
        torch.randn_like = self._randn_like
        torch.randint = self._randint

    def trained(self) -> dict[str, Tensor]:
        """Return the adapter as it is now."""
        return {name: parameter.detach() for name, parameter in self._trained.items()}

    @property
    def _sample(self) -> Any:
        def sample(latents: DiagonalGaussianDistribution, *_: Any) -> Tensor:
            return latents.mean + latents.std * self.variations[self.step]

        return sample

    def _randn_like(self, like: Tensor) -> Tensor:
        assert like.shape == self.noise[self.step].shape
        return self.noise[self.step]

    def _randint(self, _low: int, _high: int, shape: tuple[int, ...], **_: Any) -> Tensor:
        """The timesteps, which are a step's last draw."""
        found = self.timesteps[self.step]
        assert found.shape == shape
        self.step += 1
        return found


def main() -> None:
    """Run the script that the third argument names, with the arguments that follow."""
    draws_file, out, script, *arguments = sys.argv[1:]
    losses: list[float] = []
    backward = Accelerator.backward

    def recorded(accelerator: Accelerator, loss: Tensor, **options: Any) -> None:
        losses.append(loss.item())
        backward(accelerator, loss, **options)

    Accelerator.backward = recorded  # type: ignore[method-assign]
    draws = Draws(Path(draws_file))
    draws.install()
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    Path(out, "losses.json").write_text(json.dumps(losses), encoding="utf-8")
    save_file(draws.trained(), Path(out, "adapter.safetensors"))


if __name__ == "__main__":
    main()
