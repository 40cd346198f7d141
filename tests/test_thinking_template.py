"""Chat templates that open <think> themselves: prompts, scores, warm-up and evaluation see completions as opened."""

import shutil

import pytest
import torch

from sslr1 import config, model, puzzles, warmup
from sslr1.errors import UserError
from sslr1.evaluate import held_out as evaluate
from sslr1.model.tiny import CHAT_TEMPLATE
from sslr1.puzzles import Answer
from sslr1.setup import build

START = "<|im_start|>assistant\n"
TEMPLATES = {  # what they write behind START, as published ones do
    "plain": "",
    "opens": "<think>\n",
    "opens unless told": "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% else %}<think> \n\n{% endif %}",
    "closes if told": "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
}


@pytest.fixture(autouse=True)
def settings_of_torch(monkeypatch):
    """`build` makes settings for a process of its own."""
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)


def folder_with(tmp_path, tiny, template):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    whole = CHAT_TEMPLATE.replace(START, START + TEMPLATES[template])
    (folder / "chat_template.jinja").write_text(whole)
    return folder


@pytest.mark.parametrize(
    "template, thinking, opening, end",
    [
        ("plain", True, "", START),
        ("plain", False, "", START),
        ("opens", True, "<think>", f"{START}<think>\n"),
        ("opens unless told", True, "<think>", f"{START}<think> \n\n"),
        ("opens unless told", False, "", "<think>\n\n</think>\n\n"),
        ("closes if told", True, "", START),
        ("closes if told", False, "", "<think>\n\n</think>\n\n"),
    ],
)
def test_what_a_template_opens(tmp_path, tiny, photographs, template, thinking, opening, end):
    tokenizer = model.load_tokenizer(folder_with(tmp_path, tiny, template))
    assert model.opening(tokenizer, thinking) == opening
    (prompt,) = model.prompts(puzzles.make(photographs[:1], "rotation", thinking=thinking), tokenizer)
    assert tokenizer.decode(prompt.input_ids).endswith(end)


def test_opened_although_there_is_to_be_no_thinking(tmp_path, tiny, scenes, one_process):
    folder = folder_with(tmp_path, tiny, "opens")
    settings = config.check(
        {"model": {"path": str(folder)}, "data": {"path": str(scenes)}, "puzzles": {"thinking": False}}
    )
    with pytest.raises(UserError, match=r"puzzles\.thinking is false, but .* opens <think>.*puzzles\.thinking=true"):
        build.build(settings, one_process)


def test_a_form_that_the_template_rules_out_is_refused_before_the_weights_load(
    tmp_path, tiny, one_process, monkeypatch
):
    """--form, or a benchmark's own direct one: what mends it is --form thinking, whatever the configuration says."""
    folder, loaded = folder_with(tmp_path, tiny, "opens"), []
    monkeypatch.setattr(model, "load_weights", lambda *_: loaded.append(1))
    for thinking in (True, False):
        settings = config.check(
            {"model": {"path": str(folder)}, "data": {"path": "none"}, "puzzles": {"thinking": thinking}}
        )
        for forms in (("direct",), ("direct", "thinking")):
            with pytest.raises(UserError, match=r"direct form is asked for.* opens <think>.*--form thinking"):
                build.build(settings, one_process, data=False, forms=forms)
        assert not loaded
        assert build.build(settings, one_process, data=False, forms=("thinking",)).opening == "<think>"
        loaded.clear()


@pytest.mark.parametrize("template, opening", [("plain", ""), ("opens", "<think>")])
def test_completions_are_scored_as_opened(tmp_path, tiny, scenes, one_process, monkeypatch, template, opening):
    settings = config.check(
        {
            "model": {"path": str(folder_with(tmp_path, tiny, template))},
            "data": {"path": str(scenes), "min_side": 112},
            "puzzles": {"mixture": {"rotation": 1.0}},
            "train": {"warmup": {"steps": 1, "batch": 4}},
            "eval": {"count": 4},
        }
    )
    built = build.build(settings, one_process)
    answer = Answer("choice", "B", ("A", "B"))
    behind, whole = r"hm</think>\boxed{B}", r"<think>hm</think>\boxed{B}"
    assert built.score(answer, behind).reward == float(bool(opening))
    assert built.score(answer, whole).reward == float(not opening)

    groups = []
    inner = warmup.Learner.step
    monkeypatch.setattr(
        warmup.Learner, "step", lambda self, given, *a, **k: groups.extend(given) or inner(self, given, *a, **k)
    )
    warmup.warm_up(built)
    assert len(groups) == 4
    for group in groups:
        (sample,) = group.samples
        text = built.tokenizer.decode(torch.cat([group.prompt.input_ids, sample.tokens]))
        written = text.split(START)[1]
        assert written.count("<think>") == written.count("</think>") == 1 and written.startswith("<think>")
        assert built.score(answer, sample.text).format_ok

    def generate(prompts, **options):
        return [model.Group(p, [model.Sample(torch.zeros(1), torch.zeros(1), behind, "stop")]) for p in prompts]

    monkeypatch.setattr(built.engine, "generate", generate)
    assert evaluate.Evaluator(built).run()[0]["eval/rotation/format"] == float(bool(opening))
