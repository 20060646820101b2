"""Prompts that a model writes itself, and retrieval by the likeliest candidate: both on a tiny model on disk."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvcc.calibration import calibrate_model
from kvcc.calibration_data.retrieval_tasks import Task
from kvcc.frontend import LoadedModel, load_model, reference_logits, runtime_tokenizer
from kvcc.measure import Answer, RetrievalScore, retrieve, scored
from kvcc.own_text import NAME, own_text
from kvcc.profile import Profile
from kvcc.runtime import CompiledModel
from kvcc.uncompressed import uncompressed
from tests.saved import save_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(str(folder))


@pytest.fixture(scope="module")
def model(loaded: LoadedModel) -> CompiledModel:
    return uncompressed(loaded, runtime_tokenizer(loaded))


def log_likelihoods(loaded: LoadedModel, row: list[int]) -> Tensor:
    """Of each token but the first, and all others in its place, by transformers itself: [T - 1, V]."""
    ids = torch.tensor([row])
    logits = reference_logits(loaded, ids, torch.ones_like(ids), torch.arange(len(row))[None])
    return logits[0, :-1].float().log_softmax(-1)


def test_own_text_is_drawn_from_the_model(model: CompiledModel, loaded: LoadedModel) -> None:
    """Surprise is what the model expects it to be, over 19 rows in two batches."""
    seen: list[tuple[int, int]] = []
    rows = own_text(model, samples=19, length=50, seed=3, on_token=lambda *done: seen.append(done))
    assert [len(row) for row in rows] == [50] * 19
    assert seen[-1] == (19 * 50, 19 * 50)
    assert len({row[0] for row in rows}) > 5
    assert all(row[0] not in model.identity.eos_token_ids for row in rows)
    predicted = [log_likelihoods(loaded, row) for row in rows]
    surprise = torch.cat([-p.gather(1, torch.tensor(row[1:])[:, None]) for p, row in zip(predicted, rows)])
    expected = torch.cat([-(p.exp() * p).sum(-1) for p in predicted])
    spread = float(surprise.std()) / len(surprise) ** 0.5
    assert abs(float(surprise.mean() - expected.mean())) < 5 * spread


def test_own_text_follows_the_seed(model: CompiledModel) -> None:
    one, again, other = (own_text(model, samples=2, length=20, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one != other


def test_calibration_adds_own_text(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    data.write_text("some words of a user's own, " * 20)
    said: list[str] = []
    made = calibrate_model(
        str(folder), str(data), tmp_path / "p", samples=1, length=60, own=3, say=said.append
    )
    assert "writing 3 prompts of the model's own" in said
    profile = Profile.load(tmp_path / "p")
    assert {s.name: (s.samples, s.tokens) for s in profile.sources} == {NAME: (3, 180), "data.txt": (1, 60)}
    assert profile.tokens == made.tokens == 240


TASK = Task(
    "key_value", "The locker of Ann has 123. The locker of Bob has 456.", "Whose?", "456", 0.5,
    ("123", "456", "78"), "The locker of Bob has",
)  # fmt: skip


@pytest.mark.parametrize("visible", [True, False])
def test_the_preferred_candidate_is_the_likeliest(
    model: CompiledModel, loaded: LoadedModel, visible: bool
) -> None:
    """Against whole sequences through transformers, one candidate at a time."""
    assert model.tokenizer is not None
    context, question = (model.tokenizer.encode(text) for text in (TASK.context, TASK.question))
    likelihoods = []
    for candidate in TASK.candidates:
        answer = model.tokenizer.encode(f"{TASK.lead} {candidate}.")
        row = [*context, *question, *answer]
        found = log_likelihoods(loaded, row)[-len(answer) :]
        likelihoods.append(float(found.gather(1, torch.tensor(answer)[:, None]).sum()))
    best = TASK.candidates[max(range(3), key=likelihoods.__getitem__)]
    for answer_is in TASK.candidates:
        task = Task(*("", TASK.context, TASK.question, answer_is, 0.5, TASK.candidates, TASK.lead))
        found = retrieve(model, task, lambda _: (context, question), visible, 4)
        assert found.preferred == (answer_is == best)


def test_free_answers_are_the_same_after_candidates_were_compared(
    model: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model.tokenizer is not None
    context, question = (model.tokenizer.encode(text) for text in (TASK.context, TASK.question))
    (told,) = model.generate([[*context, *question]], max_tokens=12)
    answers: list[str] = []
    monkeypatch.setattr("kvcc.measure.contains_answer", lambda text, task: bool(answers.append(text)))
    for visible in (True, False):
        retrieve(model, TASK, lambda _: (context, question), visible, 12)
    expected = model.tokenizer.decode([t for t in told.tokens if t not in model.identity.eos_token_ids])
    assert answers == [expected, expected]


def test_scores_lose_what_either_way_of_asking_loses() -> None:
    answers = [
        Answer(0.1, found=True, found_uncompressed=True, preferred=False, preferred_uncompressed=True),
        Answer(0.9, found=False, found_uncompressed=False, preferred=True, preferred_uncompressed=True),
    ]
    score = scored("needle", 64, True, answers)
    assert (score.score, score.reference) == (50, 50)
    assert (score.preference, score.preference_reference) == (50, 100)
    assert score.drop == 50
    assert RetrievalScore("needle", 64, True, 2, score=25, reference=75).drop == 50
