"""python -m tests.fuzz.guided: coverage leads the bytes of an artifact's documents (needs atheris).

Options are libFuzzer's, such as `-max_total_time=600`. The first byte of an input chooses the reader; a crash, a hang
or an error that is no ArtifactError or PlanError ends the run and leaves the input as a file.
"""

import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-untyped]

with atheris.instrument_imports(include=["kvcc.runtime"]):
    from kvcc.errors import ArtifactError, ArtifactManifest, PlanError
    from kvcc.runtime.graph import parse_graph
    from kvcc.runtime.kernel_files import parse_index
    from kvcc.runtime.plan import parse_plan
    from kvcc.runtime.signature import read_signature
    from kvcc.runtime.strict_json import parse_json
    from kvcc.runtime.tensor_file import read_header

GOLDEN = Path(__file__).parent.parent / "golden/tiny.kvcc"
SEEDS = ["plan.json", "graph/graph.json", "kernels/kernels.json", "tables.safetensors"]
LIMIT = 1 << 20
FOLDER = Path(tempfile.mkdtemp())


def one_input(data: bytes) -> None:
    """Give the bytes after the first to the reader that the first one chooses."""
    which, content = data[:1], data[1:]
    try:
        if which == b"p":
            parse_plan(parse_json(content, "plan", ArtifactManifest, LIMIT))
        elif which == b"g":
            parse_graph(parse_json(content, "graph", ArtifactManifest, LIMIT))
        elif which == b"k":
            parse_index(parse_json(content, "index", ArtifactManifest, LIMIT), "kernels/sm_90.json")
        elif which == b"t":
            (FOLDER / "x.safetensors").write_bytes(content)
            read_header(FOLDER / "x.safetensors")
        elif which == b"s":
            (FOLDER / "signature.json").write_bytes(content)
            read_signature(FOLDER)
    except (ArtifactError, PlanError):
        pass


def main() -> None:
    """Begin with the documents of the golden artifact."""
    corpus = Path(tempfile.mkdtemp())
    for letter, name in zip("pgkt", SEEDS, strict=True):
        (corpus / letter).write_bytes(letter.encode() + (GOLDEN / name).read_bytes())
    atheris.Setup([*sys.argv, str(corpus), f"-max_len={LIMIT}"], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
