"""Calibration prompts of the long-context kind: prose with hidden facts, a question and its answer."""

from kvcc.calibration_data.retrieval_tasks import GENERATORS

CHARS_PER_WORD = 5.4  # of our prose, spaces included; a little low, so that texts come out long enough


def retrieval(seed: int, index: int, chars: int) -> str:
    """One retrieval task of at least `chars` characters; the kinds take turns with the index."""
    generate = list(GENERATORS.values())[index % len(GENERATORS)]
    words = int(chars / CHARS_PER_WORD) + 1
    while True:
        task = generate(seed, index, words, side="calibration")
        text = f"{task.context}\n\nQuestion: {task.question}\nAnswer: {task.answer}\n"
        if len(text) >= chars:
            return text
        words += words // 10 + 10
