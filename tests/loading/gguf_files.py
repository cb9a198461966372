"""The end of every file that gguf-py writes."""

from pathlib import Path

import gguf


def finish(writer: gguf.GGUFWriter, path: Path = Path()) -> Path:
    """Write what was added to a file, and return its path."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
