"""The ControlNet recipe, from the dataset's maps to the files of a version."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from toile.diffusion.adapter_header import AdapterCard, control_header
from toile.diffusion.bundle import Bundle
from toile.diffusion.conformance import check_controlnet
from toile.diffusion.controls import CONTROLNET_FOLDER, LoadedControl, load_controlnet
from toile.diffusion.denoiser import TorchDenoiser
from toile.diffusion.triton.packed import empty_unet
from toile.diffusion.vision import Vision
from toile.imaging.control_maps import ControlKind
from toile.training.cache_plans import EXAMPLES
from toile.training.caches import Cache
from toile.training.checks import hold_out, sample_order
from toile.training.config import MAPS, ControlNetRecipeConfig
from toile.training.control_measures import Measures, Sample, metrics_of
from toile.training.controlnet import ControlledUNet, start_training
from toile.training.data import Example
from toile.training.maps import ControlCache, with_maps
from toile.training.noise_prediction import NoisePrediction
from toile.training.recipe import Judged, Materials, Recipe, Served, reload_frozen

ALIGNMENT_FILE = "alignment.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_HALF = {"F16": torch.float16, "BF16": torch.bfloat16}


class ControlNet(Recipe):
    """A ControlNet that is trained beside the bundle's UNet.

    Samples are drawn under the maps of the dataset's images, first of those that are held out.
    """

    def __init__(
        self,
        bundle: Bundle,
        config: ControlNetRecipeConfig,
        cache: ControlCache,
        examples: Sequence[Example],
    ) -> None:
        """Make a new one; the examples are the cache's."""
        self._bundle = bundle
        self._config = config
        self._cache = cache
        self._examples = examples
        self._kind = ControlKind(config.control_kind)
        names = [example.file_name for example in examples]
        self._order = sample_order(names, config.validation_share, recipe=config.RECIPE)
        self._dtype = stored_dtype(bundle.path / "unet")
        initial = None
        if config.initial_weights == "base":
            folder = bundle.path / CONTROLNET_FOLDER / self._kind
            initial = load_controlnet(folder, bundle.unet.config).to(bundle.device)
        self.network: ControlledUNet = start_training(bundle.unet, config, initial)

    def finish(self) -> None:
        """Round the weights to what a file will hold of them; bring the UNet back to fp32."""
        reload_frozen(self._bundle.unet, self._bundle.path)
        self.network.controlnet.requires_grad_(False)
        for tensor in self.network.controlnet.state_dict().values():
            tensor.copy_(tensor.to(self._dtype))

    def trained(self, index: int) -> Mapping[str, Any]:
        """The network in memory, and the map of the sample's image."""
        return {"controls": [LoadedControl(self.network.controlnet, self._map(index))]}

    def export(self, folder: Path, card: AdapterCard) -> None:
        """Write it in diffusers' layout, in the precision of the base's own UNet."""
        target = folder / CONTROLNET_FOLDER
        network = self.network.controlnet
        network.save_config(target)
        state = {
            name: tensor.detach().to("cpu", self._dtype).contiguous()
            for name, tensor in network.state_dict().items()
        }
        save_file(state, target / WEIGHTS_FILE, metadata=control_header(card, self._kind))

    def check(self, folder: Path) -> None:
        """Refuse files that other programs would not take whole."""
        check_controlnet(folder / CONTROLNET_FOLDER / WEIGHTS_FILE, empty_unet(self._bundle.path))

    def served(self, folder: Path, bank: Path, bundle: Bundle, index: int) -> Served:  # noqa: ARG002
        """The network of the version's files beside the UNet, and the map of the sample's image."""
        network = load_controlnet(folder / CONTROLNET_FOLDER, bundle.unet.config)
        network.to(bundle.device)
        fields = {"controls": [LoadedControl(network, self._map(index))]}
        denoiser = TorchDenoiser(bundle, autocast=torch.float32)
        return Served(denoiser, fields, f"{CONTROLNET_FOLDER}/{WEIGHTS_FILE}")

    def judged(
        self, samples: Sequence[Image.Image], without: Callable[[int], Image.Image]
    ) -> Judged:
        """The samples' maps, and how well each keeps to its own, with control and without."""
        files = {f"samples/{i:02d}.map.png": _png(self._map(i)) for i in range(len(samples))}
        segmenter = (self._bundle.path / "segmenter").is_dir()
        measures = Measures(self._kind, Vision(self._bundle.path), has_segmenter=segmenter)
        if not samples or not measures:
            return Judged(files)
        names = [example.file_name for example in self._examples]
        _, held_out = hold_out(names, self._config.validation_share, recipe=self._config.RECIPE)
        facts = measures.facts(
            [
                Sample(
                    self._examples[place],
                    place in held_out,
                    self._cache.planes[place].numpy(),
                    image,
                    without(index),
                )
                for index, image in enumerate(samples)
                for place in [self._place(index)]
            ]
        )
        files[ALIGNMENT_FILE] = (json.dumps(facts, indent=2) + "\n").encode()
        return Judged(files, metrics_of(facts))

    def _map(self, index: int) -> Image.Image:
        (shown,) = self._cache.maps([self._place(index)])
        return Image.fromarray(shown.permute(1, 2, 0).numpy())

    def _place(self, index: int) -> int:
        """The example whose map a sample is drawn under; there may be more samples than images."""
        return self._order[index % len(self._order)]


def make(
    config: ControlNetRecipeConfig, materials: Materials
) -> tuple[ControlNet, NoisePrediction]:
    """Make the recipe, and what it learns."""
    planes = materials.caches[MAPS]["planes"]
    cache = with_maps(Cache(**materials.caches[EXAMPLES]), planes, ControlKind(config.control_kind))
    recipe = ControlNet(materials.bundle, config, cache, materials.examples)
    return recipe, materials.noise_prediction(cache, config)


def stored_dtype(folder: Path) -> torch.dtype:
    """Precision of a network's files: fp32 unless its first tensor is half.

    A ControlNet is kept as its base is. Beside weights that were rounded, twice the bytes say
    little.
    """
    file = min(folder.glob("*.safetensors"))
    with safe_open(file, "pt") as tensors:
        return _HALF.get(tensors.get_slice(next(iter(tensors.keys()))).get_dtype(), torch.float32)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
