"""report.html: what is on it, that a model's words stay words, and that it stays small."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sslr1 import config, model, ops, puzzles
from sslr1.report import charts
from sslr1.report import page as report
from sslr1.runs.records import JsonLines
from sslr1.runs.samples import Samples
from tests.browser import CHROMIUM, Page
from tests.conftest import ROOT
from tests.forks import launch

NASTY = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror='document.title=1'><!--",
    "\\boxed{A} & <b>bold</b> \u2028 {{ 7 * 7 }} ]]>",
    "<think>long</think>" + "word " * 4000 + "\\boxed{B}",
]


def step(k, level):
    """A record of metrics.jsonl, in an adaptive run that sees all kinds of trouble."""
    out = {"step": k, "reward": k / 100, "frac_reward_zero_std": 0.5, "entropy": float("nan") if k == 5 else 1 / k}
    out |= {"kl": 0.01 * k, "loss": -0.1, "skipped_steps": int(k >= 5), "curriculum/rotation/level": level}
    out |= {"curriculum/rotation/plateau": 1.0} if k == 7 else {}
    out |= {"alarm/entropy": 1.0} if k == 9 else {}
    out |= {f"{what}/rotation/level{level}": v for what, v in (("exact", 0.5), ("accuracy", 0.5), ("chance", 0.25))}
    out |= {"exact/ordering/level1": 0.25, "accuracy/ordering/level1": 0.625, "chance/ordering/level1": 0.125}
    out |= {"rewards/rotation/mean": 0.5, "rewards/ordering/mean": 0.25, "perf/tokens_per_second": 10.0}
    return out | {"timing_s/rollout": 1.0, "timing_s/learner": 2.0, "timing_s/step": 3.0, "timing_s/elapsed": 3.0 * k}


def evaluation(exact):
    found = {"exact": exact, "accuracy": exact, "chance": 0.25, "n": 100}
    return {f"eval/{name}/{k}": v for name in ("rotation", "ordering") for k, v in found.items()}


def write_samples(folder, steps, tokenizer, images, texts=NASTY):
    """Two puzzles a step, with the texts as answers of each."""
    samples = Samples(folder)
    for k in steps:
        batch = puzzles.make(images[:2], ["rotation", "ordering"], level=[2, 2], index=[2 * k, 2 * k + 1])
        drawn = [SimpleNamespace(text=t, tokens=t.split(), finish="stop") for t in texts]
        drawn[-1].finish = "length"
        scored = [*texts[:-1], ""]  # what was cut off earns nothing
        scores = [[puzzles.score(a, t) for t in scored] for a in batch.answers]
        rewards = torch.tensor([[s.reward for s in row] for row in scores])
        groups = [SimpleNamespace(samples=drawn)] * 2
        samples.write(k, batch, model.prompts(batch, tokenizer), groups, scores, ops.advantages(rewards))
    return samples


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny, photographs):
    folder = tmp_path_factory.mktemp("runs") / "a <i>run & more"
    folder.mkdir()
    overrides = ("puzzles.mixture={rotation: 0.5, ordering: 0.5}", "puzzles.levels={ordering: 1}", "train.steps=20")
    settings = config.load(ROOT / "configs" / "tiny.yaml", (*overrides, f"log.name='{folder.name}'"))
    (folder / "config.yaml").write_text(config.dump(settings))
    lines = JsonLines(folder / "metrics.jsonl")
    lines.write({"step": 0, **evaluation(0.25)})
    for k in range(1, 21):
        lines.write(step(k, 2 if k < 7 else 1) | (evaluation(0.5) if k == 20 else {}))
    write_samples(folder, range(1, 21), model.load_tokenizer(tiny), photographs)
    report.write(folder)
    return folder


class Parts(HTMLParser):
    """Tags with their attributes, the text of the page, and of each script."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.scripts, self.text, self._inside = [], [], "", None
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag
        self.text += " "

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.text += data


def data_of(source):
    return json.loads(Parts(source).scripts[0], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_models_words_stay_words(run):
    source = (run / "report.html").read_text(encoding="utf-8")
    parts = Parts(source)
    assert len(parts.scripts) == 2 and not {"img", "i", "b"} & {t for t, _ in parts.tags if t != "b"}
    assert "<!--" not in source and source.count("</script>") == 2
    assert run.name in parts.text and "a &lt;i&gt;run &amp; more" in source
    policy = next(a["content"] for t, a in parts.tags if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(parts.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not re.findall(r"(?:src|href|action)=[\"'](?!#)", source) and not re.search(r"url\(|@import", source)
    assert "innerHTML" not in parts.scripts[1] and "insertAdjacentHTML" not in parts.scripts[1]
    for sample in data_of(source)["samples"]:
        texts = [c["text"] for c in sample["completions"]]
        assert texts[:3] == NASTY[:3] and len(texts[3]) < 4100 and "characters …" in texts[3]
        assert texts[3].startswith("<think>long") and texts[3].endswith("\\boxed{B}")


def test_samples_are_what_the_model_saw(run):
    lines = JsonLines(run / "samples.jsonl").read()
    shown = data_of((run / "report.html").read_text(encoding="utf-8"))["samples"]
    assert len(shown) == len(lines) == 40
    for line, sample in zip(lines, shown):
        assert all(sample[k] == line[k] for k in ("step", "puzzle", "level", "slot", "question", "sizes"))
        assert sample["question"].count("<image>") == len(sample["sizes"])
        assert base64.b64decode(sample["picture"].split(",")[1]) == (run / line["picture"]).read_bytes()
        assert [c["outcome"] for c in sample["completions"]] == ["no format", "no format", "no format", "cut off"]
        assert all(c["advantage"] == 0 for c in sample["completions"])


def test_the_table_and_the_charts_hold_the_metrics(run):
    source = (run / "report.html").read_text(encoding="utf-8")
    words = " ".join(Parts(source).text.split())
    assert "rotation level 2 25.0% 25.0 ± 4.3 50.0 ± 5.0 +25.0 ± 6.6 100" in words
    for event in (
        "step 5 ⚠ update skipped",
        "step 7 ⚠ rotation earns what guessing earns",
        "step 7 rotation moves from level 2 to level 1",
        "step 9 ⚠ entropy has been under",
    ):
        assert event in words
    sections = data_of(source)["sections"]
    found = {c["title"]: c for s in sections for c in s["charts"]}
    assert all(s["steps"] == list(range(1, 21)) and s["per"] == 1 for s in sections)
    exact = found["rotation: exact answers"]
    assert [(line["name"], line["value"]) for line in exact["lines"]] == [
        ("chance, level 1", 0.25),
        ("chance, level 2", 0.25),
    ]
    assert [s["values"][5:7] for s in exact["series"]] == [[None, 0.5], [0.5, None]]
    assert exact["points"]["steps"] == [0, 20] and exact["points"]["values"] == [0.25, 0.5]
    assert exact["points"]["errors"] == pytest.approx([0.0433, 0.05], abs=1e-4)
    assert [(m["step"], m["alarm"]) for m in exact["marks"]] == [(7, False), (7, True)] and not found[
        "ordering: exact answers"
    ]["marks"]
    assert [m["step"] for m in found["Entropy, nats a token"]["marks"]] == [9]
    assert "ordering: places right" in found and "rotation: places right" not in found
    assert found["Entropy, nats a token"]["series"][0]["values"][4:6] == [None, 0.1667]
    assert found["KL to the reference, nats a token"]["series"][0]["values"][-1] == 0.2
    assert [s["name"] for s in found["Time a step, s"]["series"]] == ["rollout", "learner"]
    assert [c["title"] for s in sections if s["folded"] for c in s["charts"]] == ["loss"]  # it has no chart of its own
    drawn = {title for title in found}
    assert not drawn & {"timing_s/elapsed", "step", "skipped_steps"} and "Memory of rank 0, GiB" not in drawn


def test_a_long_run_stays_small(run, tmp_path):
    """Ten thousand steps, long answers, large pictures: means, and a choice that is spread evenly over the steps."""
    noise = np.random.default_rng(0)
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    steps = [step(k, 2) for k in range(1, 10_001)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    line = JsonLines(run / "samples.jsonl").read()[0]
    line["picture"] = "picture.webp"
    (tmp_path / "picture.webp").write_bytes(noise.bytes(60_000))
    with (tmp_path / "samples.jsonl").open("w") as file:
        for k in range(1, 1001):
            for name in ("rotation", "ordering"):
                file.write(json.dumps({**line, "step": k, "puzzle": name}) + "\n")
        file.write('{"step": 1001, "puzzle": "rotation", "lev')  # what a kill leaves
    source = report.page(tmp_path)
    assert 2_000_000 < len(source.encode()) < 5_000_000
    data = data_of(source)
    assert all(len(s["steps"]) <= charts.POINTS and s["steps"][-1] == 10_000 for s in data["sections"])
    reward = data["sections"][0]["charts"][0]["series"][0]["values"]
    assert reward[0] == pytest.approx(0.175) and len(reward) == 295  # of 34 steps: (1 + … + 34) / 34 / 100
    for name in ("rotation", "ordering"):
        chosen = [s["step"] for s in data["samples"] if s["puzzle"] == name]
        gaps = np.diff(chosen)
        assert chosen[0] == 1 and chosen[-1] == 1000 and len(chosen) > 10 and gaps.max() - gaps.min() <= 1
    (tmp_path / "picture.webp").unlink()
    shown = data_of(report.page(tmp_path))["samples"]
    assert shown[0]["picture"] is None and len(shown) == report.SAMPLES


def test_a_run_that_has_only_begun_has_a_report(run, tmp_path):
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    assert "0 of 20" in Parts(report.page(tmp_path)).text
    JsonLines(tmp_path / "metrics.jsonl").write({"step": 0, **evaluation(0.25)})
    assert "at step 0, the only evaluation so far" in Parts(report.page(tmp_path)).text


def test_the_command(run, tmp_path):
    out = tmp_path / "page.html"
    assert launch("sslr1", "report", run, "--out", out).stdout == f"{out}\n"
    assert data_of(out.read_text(encoding="utf-8")) == data_of((run / "report.html").read_text(encoding="utf-8"))
    done = launch("sslr1.report", tmp_path, check=False)
    assert done.returncode == 2 and "is no run folder: its config.yaml can't be read" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 390, 1600])
def test_in_a_browser(run, tmp_path, width, dark):
    """Charts and samples are drawn, nothing is wider than the screen, nothing is fetched, no script of a model's
    runs."""
    with Page(run / "report.html", tmp_path / "profile", width, dark=dark) as page:
        assert page.run("document.documentElement.scrollWidth") <= width
        overflowing = (
            "[...document.querySelectorAll('figure, article')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
        )
        assert page.run(overflowing) == 0
        background = page.run("getComputedStyle(document.body).backgroundColor")
        assert (int(re.findall(r"\d+", background)[0]) < 50) == dark
        titles = page.run("[...document.querySelectorAll('figcaption')].map(e => e.textContent)")
        assert titles == [
            c["title"] for s in data_of((run / "report.html").read_text())["sections"] for c in s["charts"]
        ]
        assert page.run("document.querySelector('figure path.line').getAttribute('d').length") > 100
        assert not page.run(
            "[...document.querySelectorAll('svg *')]"
            ".some(e => [...e.attributes].some(a => /NaN|Infinity/.test(a.value)))"
        )
        page.run("document.querySelector('#everything-else details').open = true")
        page.settle()
        drawn = page.run("[...document.querySelectorAll('figure svg')].map(e => e.querySelectorAll('path').length)")
        assert len(drawn) == len(titles) and all(drawn)  # those that were folded away too
        texts = page.run("[...document.querySelector('article').querySelectorAll('pre')].map(e => e.textContent)")
        assert texts[:3] == NASTY[:3] and page.run("document.title") == f"{run.name} · SSL-R1"
        page.run("document.querySelector('figure svg').scrollIntoView()")
        x, y = page.run(
            "(r => [r.x + r.width / 2, r.y + 50])(document.querySelector('figure svg').getBoundingClientRect())"
        )
        page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        page.settle()
        tip = page.run("document.querySelector('.tip:not([hidden])').textContent")
        assert re.fullmatch(r"step (9|10|11|12)all 0\.(09|1|11|12)rotation 0\.5ordering 0\.25", tip)
        choose = "(s => { s.value = 'ordering'; s.dispatchEvent(new Event('change')) })"
        page.run(f"{choose}(document.querySelector('[name=puzzle]'))")
        page.run("document.querySelector('[name=back]').click()")
        heads = page.run("[...document.querySelectorAll('article h3')].map(e => e.textContent)")
        assert [int(re.search(r"step (\d+)", h)[1]) for h in heads] == list(range(9, 15))
        assert all(h.startswith("ordering, level 2") for h in heads)
        orderings = [s for s in data_of((run / "report.html").read_text())["samples"] if s["puzzle"] == "ordering"]
        drawn = "Promise.all([...document.querySelectorAll('article image')].map(e => e.decode().then(() => 1)))"
        assert sum(page.run(drawn)) == sum(s["question"].count("<image>") for s in orderings[8:14])
        page.settle()
        assert not page.problems, page.problems
        assert not [url for url in page.requests if not url.startswith(("data:", run.as_uri()))]


def test_what_was_not_read_and_bad_is_on_the_page(run):
    """Names as words; some of many; nothing where there is nothing to say."""
    assert report.images(run) is None and "<h2>Images</h2>" not in report.page(run)
    (run / "found.txt").write_text("\n")
    assert report.images(run) is None
    (run / "found.txt").write_text("88 files: 20 images, 68 not read (38 .heic, 30 .avif)\n")
    (run / "bad_images.txt").write_text("a\tb <i>.jpg\tflat\ncoco\trefused: a link to nothing\n")
    text = Parts(report.page(run)).text
    assert "88 files: 20 images, 68 not read (38 .heic, 30 .avif)" in text
    assert "1 image was bad, see bad_images.txt:" in text and "a\tb <i>.jpg" in text
    (run / "bad_images.txt").write_text("".join(f"{i}.jpg\tflat\n" for i in range(1200)))
    text = Parts(report.page(run)).text
    assert "1,200 images were bad, see bad_images.txt, e.g." in text and text.count(".jpg") == report.BAD
    (run / "found.txt").unlink()
    (run / "bad_images.txt").unlink()
