"""Map names of formats and of other programs to the options of `backend=`."""

from __future__ import annotations

import re

from qexp.config.plugins import plugin_names
from qexp.config.yaml_options import option_names, options_of_plugin
from qexp.errors import choices

MEANT: dict[str, tuple[str, ...]] = {  # a pattern of the whole name -> what to write after `backend=`
    r"(bnb|bits_and_bytes|bitsandbytes)?_?nf4|bnb(_?4bit)?|4bit|load_in_4bit|qlora": ("bitsandbytes",),
    r"(bnb_)?fp4|float4": ("bitsandbytes_fp4",),
    r"nf4_dq|double_quant|bnb_nf4_dq": ("bitsandbytes_nf4_dq",),
    r"llm_?int8|bnb_?(int8|8bit)|8bit|load_in_8bit": ("bitsandbytes_int8",),
    r"w?int8(wo)?|w8a16|8": ("torchao", "bitsandbytes_int8", "quanto"),
    r"int8dq|w8a8|a8w8|dynamic_int8": ("torchao_int8dq",),
    r"(fp|float|f)8(wo)?|(fp8_?|float8_?)?e4m3(fn)?": ("torchao_float8wo", "quanto_float8"),
    r"(fp8_?|float8_?)?e5m2": ("torchao_float8wo_e5m2",),
    r"u?int4(wo)?|w4a16|4": ("quanto_int4", "packed_uint4", "bitsandbytes"),
    r"u?int3(wo)?|3": ("packed_uint3",),
    r"u?int2(wo)?|2": ("quanto_int2", "packed_uint2"),
    r"(fp|float)6": ("packed_fp6_e3w2", "packed_fp6_e2w3"),
    r"(fp|float)5": ("packed_fp5_e2w2",),
    r"q8_0|ggml|llama_?cpp": ("gguf",),
    r"q4_0": ("gguf_q4_0",),
    r"q4_1": ("gguf_q4_1",),
    r"q5_0": ("gguf_q5_0",),
    r"q5_1": ("gguf_q5_1",),
    r"mxfp4": ("gguf backend.quant_type=MXFP4",),
    r"tq([12])_0": ("gguf backend.quant_type=TQ2_0",),
    r"ao|torch_ao": ("torchao",),
    r"optimum(_quanto)?|hf_quanto": ("quanto",),
    r"fp16|bf16|fp32|float16|bfloat16|float32|half|dense|full|baseline|off|no|false|original|unquantized": ("none",),
}
BY_THEIR_PROGRAM = re.compile(
    r"(auto_?)?(gptq|awq|round)(_?model|_marlin)?|gptq_?v2|aqlm|hqq|eetq|exl[23]|exllama(v[23])?|marlin|smooth_?quant|spqr|quip"
    r"|quip_?sharp|higgs|vptq|omniquant|squeezellm|nunchaku|svdquant|compressed_?tensors|llm_?compressor|modelopt|nvfp4"
    r"|fbgemm(_fp8)?|fp_quant|bitnet|sinq|quark|tensorrt|trt|openvino|onnx|mlx|coreml"
)
READ_ONLY = re.compile(r"(gguf_)?(q[2-6]_?k(_[sml]|_xl)?|iq[1-4]_?(xxs|xs|s|m|nl)?)")


def other_word(name: str) -> str:
    """Return a hint for an unknown backend's name that is known from elsewhere; '' for other names."""
    word = name.lower().replace("-", "_").replace(".", "_").strip("_")
    if word in option_names("backend"):
        return f" (did you mean {word}?)"
    if word in plugin_names("backend") and (options := options_of_plugin("backend", word)):
        return f" (did you mean {choices(f'backend={option}' for option in options)}?)"
    meant = next((options for pattern, options in MEANT.items() if re.fullmatch(pattern, word)), ())
    if known := [option for option in meant if option.partition(" ")[0] in option_names("backend")]:
        return f" (did you mean {choices(f'backend={option}' for option in known)}?)"
    if READ_ONLY.fullmatch(word):
        return " (a GGUF type that only llama.cpp makes: such a file is read, with model.path=<file>.gguf)"
    if BY_THEIR_PROGRAM.fullmatch(word):
        return " (a format that is made by a program of its own, and not here)"
    return ""
