"""What the server prints once the engine is loaded: what it serves, and a request to try."""

from mi_runtime.request import EngineInfo


def ready_message(
    *, model: str, profile: str, address: str, info: EngineInfo, needs_key: bool
) -> str:
    key = " -H 'Authorization: Bearer KEY'" if needs_key else ""
    return (
        f"Ready: {model} ({describe_engine(info)}profile {profile}) at {address}\n"
        f"Try:\n"
        f"  curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '"
        f'{{"model": "{model}", "reasoning_lambda": 0.6, "messages": [{{"role": "user", '
        f'"content": "a=6,b=a-2,c=b+6,d=c-3. d?"}}]}}\''
    )


def describe_engine(info: EngineInfo) -> str:
    """Describes the model, its memory, and what the engine chose at start."""
    return (
        f"{info.model_type}, {_numbers(info)} on {info.device}, context {info.max_model_len}, "
        f"weights {_size(info.weight_bytes)}, {_size(info.peak_bytes)} at the peak of loading; "
        f"attention {info.attention}; {_products(info)}{_graphs(info)}"
    )


def _numbers(info: EngineInfo) -> str:
    """Names the number formats of the weights."""
    return (
        info.dtype if info.delta_dtype == "none" else f"{info.dtype} and {info.delta_dtype} delta"
    )


def _products(info: EngineInfo) -> str:
    """Describes the kernels of pair products, if several were measured."""
    return f"pair kernels {info.pair_kernels}; " if info.pair_kernels else ""


def _graphs(info: EngineInfo) -> str:
    return "" if info.graphs == "none" else f"CUDA graphs: {info.graphs}; "


def _size(count: int) -> str:
    """Writes a number of bytes with three significant digits."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB" if value < 999.5 else f"{value:.0f} GB"
