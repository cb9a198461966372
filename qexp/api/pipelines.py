"""`qexp.load_pipeline`: a whole pipeline of diffusers, quantized while it is loaded, as diffusers' own object."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexp.api.arguments import SOURCE, backend_config, expanded, loader_settings, places_of
from qexp.api.models import offload as offload_model
from qexp.checkpoints.regular_file import read_ahead
from qexp.hub.download import pinned
from qexp.models.component_settings import merge_components, parse_component
from qexp.models.diffusers import DiffusersConfig, Source

if TYPE_CHECKING:
    import torch

    from qexp.config.offload import OffloadConfig


def load_pipeline(
    path: str | Path,
    backend: Any = None,
    *,
    quantize: Iterable[str] | None = None,
    components: Mapping[str, Any] | None = None,
    checkpoints: Mapping[str, str | Path] | None = None,
    revision: str | None = None,
    variant: str | None = None,
    device: str | torch.device = "auto",
    compute_dtype: str | torch.dtype | None = None,
    skip_modules: str | Iterable[str] = (),
    keep_in_fp32_modules: Iterable[str] = (),
    plain_fp8: bool = False,
    offload: str | OffloadConfig | None = None,
    workers: int | None = None,
    in_flight_mib: int = 64,
    map: bool | str = "auto",
    cache: str | Path | None = None,
    cache_gib: float | None = None,
) -> Any:
    """Load a pipeline of diffusers: its components one after the other, each weight quantized as it is read.

    path: a folder with model_index.json, or a name on a hub (user/name) with its revision; variant: of the weights'
        files, such as "fp16".
    backend: as of `qexp.load`, for the components in `quantize`: the denoiser if that is None. The others are loaded as
        they are.
    components: component -> a backend of its own, or a mapping with some of backend, compute_dtype, skip_modules and
        keep_in_fp32_modules, which replace those for all.
    checkpoints: component -> its weights from elsewhere, such as a .gguf file.
    compute_dtype: of all components; None is each checkpoint's own.
    skip_modules, keep_in_fp32_modules: patterns for the components that `backend` is for.
    plain_fp8: as of `qexp.load`, for all components.
    workers, in_flight_mib, map, cache, cache_gib: as of `qexp.load`.
    offload: a strategy of `qexp.offload`, or its config: each component is offloaded before the next one is loaded.

    Returns: diffusers' pipeline, such as a FluxPipeline: `pipe("a red cube").images[0]`. `qexp.save` saves it whole.
    Raises: as `qexp.load`; what is wrong with any component comes before a weight is read.
    """
    from qexp.loading.component import CacheFolder
    from qexp.loading.components import plan_components, request_components
    from qexp.loading.lifecycle import load_planned

    place, _, _ = places_of(device, None, None)
    source = Source(
        DiffusersConfig(
            path=pinned(str(expanded(path, "path")), revision, variant, place="path"),
            variant=variant,
            quantize=None if quantize is None else tuple(quantize),
            checkpoints={name: str(file) for name, file in (checkpoints or {}).items()},
        )
    )
    given = {
        "backend": backend,
        "skip_modules": skip_modules,
        "keep_in_fp32_modules": keep_in_fp32_modules,
        "compute_dtype": compute_dtype,
        "plain_fp8": plain_fp8,
    }
    own = {
        name: values if isinstance(values, Mapping) and "quant_method" not in values else {"backend": values}
        for name, values in (components or {}).items()
    }
    base = parse_component(given, to_backend=backend_config)
    settings = merge_components(source, base, own, to_backend=backend_config)
    loader = loader_settings(in_flight_mib=in_flight_mib, workers=workers, map=map, cache=cache, cache_gib=cache_gib)
    cache_folder = CacheFolder.of(loader)
    requests = request_components(source, settings, device=place, cache=cache_folder, warms_up_first=False)
    read_ahead(file for request in requests.values() for file in request.checkpoint.files)
    planned = plan_components(requests, travels=offload is not None)
    pipeline = source.pipeline({name: component.prepared.model for name, component in planned.items()})
    for component in planned.values():
        model = load_planned(component, loader).model
        if offload is not None:
            offload_model(model, offload, place, block_lists=source.block_lists(model))
    vars(pipeline)[SOURCE] = source
    return pipeline
