"""report.html: what is on it, that a model's words stay words, and that it stays small."""

import base64
import hashlib
import json
import re
import time
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from sslr1 import config, model, ops, puzzles
from sslr1.report import charts, mends, samples
from sslr1.report import page as report
from sslr1.runs.alarms import MESSAGES, advice
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
    out |= {"curriculum/rotation/mean": 0.5} | ({"curriculum/rotation/plateau": 1.0} if k == 7 else {})
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
    written = Samples(folder)
    for k in steps:
        batch = puzzles.make(images[:2], ["rotation", "ordering"], level=[2, 2], index=[2 * k, 2 * k + 1])
        drawn = [SimpleNamespace(text=t, tokens=t.split(), finish="stop") for t in texts]
        drawn[-1].finish = "length"
        scored = [*texts[:-1], ""]  # what was cut off earns nothing
        scores = [[puzzles.score(a, t) for t in scored] for a in batch.answers]
        rewards = torch.tensor([[s.reward for s in row] for row in scores])
        groups = [SimpleNamespace(samples=drawn)] * 2
        written.write(k, batch, model.prompts(batch, tokenizer), groups, scores, ops.advantages(rewards))


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny, photographs):
    folder = tmp_path_factory.mktemp("runs") / "a <i>run & more"
    folder.mkdir()
    overrides = ["puzzles.mixture={rotation: 0.5, ordering: 0.5}", "puzzles.levels={ordering: 1}", "train.steps=20"]
    overrides += ["puzzles.curriculum=adaptive"]
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
    (points,) = exact["points"]
    assert points["steps"] == [0, 20] and points["values"] == [0.25, 0.5]
    assert points["errors"] == pytest.approx([0.0433, 0.05], abs=1e-4)
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


def another(run, folder, **changes):
    """A copy of a run's settings and records under other settings, e.g. puzzles={"curriculum": "fixed"}."""
    settings = yaml.safe_load((run / "config.yaml").read_text())
    for section, own in changes.items():
        settings[section] |= own
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    return folder


def titles(source):
    return {chart["title"] for section in data_of(source)["sections"] for chart in section["charts"]}


def test_levels_that_are_fixed_have_no_curriculum_charts(run, tmp_path):
    drawn = {title for title in titles(report.page(run)) if "urriculum" in title}
    assert drawn == {"Level of the curriculum", "The curriculum's gain over chance"}
    drawn = titles(report.page(another(run, tmp_path, puzzles={"curriculum": "fixed"})))
    assert not {title for title in drawn if "urriculum" in title}


def test_what_stood_before_is_called_what_it_was(run, tmp_path):
    """The first evaluation comes after the warm-up, where there was one."""
    assert "chance after warm-up after change" in " ".join(Parts(report.page(run)).text.split())
    plain = another(run, tmp_path, train={"warmup": {"steps": 0}})
    assert "chance before after change" in " ".join(Parts(report.page(plain)).text.split())


@pytest.mark.parametrize(
    "values, options, logarithmic",
    [
        ([1.0, 0.01, 0.3], {"zero": True}, True),
        ([1.0, 0.011], {"zero": True}, False),
        ([0.0, 1e-6, 1e-3], {}, True),
        ([0.0, 0.0, 1e-6, 1e-3, 0.0], {}, False),  # mostly nothing
        ([-1.0, 1e-3, 5.0], {}, False),
        ([None, None], {}, False),
        ([1e-3, 1.0], {"percent": True}, False),
        ([1e-3, 1.0], {"raw": True}, False),
    ],
)
def test_what_spans_decades_has_a_logarithmic_axis(values, options, logarithmic):
    records = [{"step": k + 1, "reward": 0.5, "grad_norm": v} for k, v in enumerate(values) if v is not None]
    records = records or [{"step": 1, "reward": 0.5, "grad_norm": float("nan")}]
    (chart,) = charts._Run(records).chart("Gradient", {"norm": "grad_norm"}, **options)
    assert chart.get("log", False) == logarithmic and not (logarithmic and "zero" in chart)


def test_each_alarm_leads_to_its_mend(run):
    """On the page, and to a section of docs/troubleshooting.md. An alarm of a new kind needs an entry."""
    source = report.page(run)
    tags = Parts(source).tags
    links = {attributes["href"] for tag, attributes in tags if tag == "a"}
    ids = {attributes["id"] for _, attributes in tags if "id" in attributes}
    assert {"#mend-entropy", "#mend-plateau", "#mend-gradient"} <= links
    drawn = {f"#{section['title'].lower().replace(' ', '-')}" for section in data_of(source)["sections"]}
    assert {link[1:] for link in links - drawn} <= ids
    settings = report.read(run)[0]
    assert advice("entropy", settings)[1:] in Parts(source).text
    headings = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert set(MESSAGES) < set(mends.SECTIONS)
    for kind in mends.SECTIONS:
        (mend,) = mends.mends([{"mend": kind, "about": "rotation"}], settings)
        assert len(mend["words"]) > 100 and f"\n## {mend['title']}\n" in headings
    two = [{"mend": "plateau", "about": name} for name in ("rotation", "ordering")]
    assert len(mends.mends(two, settings)) == 1


def test_the_hardest_are_those_that_got_least_right_late(run, tmp_path):
    line, rewards = JsonLines(run / "samples.jsonl").read()[0], {}
    with (tmp_path / "samples.jsonl").open("w") as file:
        for k in range(1, 61):
            right = 0.0 if k < 30 else float(k % 3 > 0)
            text = '"accuracy": 1.0, "reward": 1.0'  # as a model may write
            completions = [{**c, "accuracy": right, "reward": 0.1, "text": text} for c in line["completions"]]
            rewards[k] = right
            file.write(json.dumps({**line, "step": k, "completions": completions}) + "\n")
    shown, hardest = samples.samples(tmp_path)
    assert len(shown) == 60 and len(hardest) == samples.HARDEST
    unsolved = [k for k, right in rewards.items() if k >= 30 and not right]
    assert [one["step"] for one in hardest[: len(unsolved)]] == unsolved
    assert all(one["step"] >= 30 for one in hardest)


def test_a_page_follows_its_run_while_that_goes_on(run, tmp_path):
    folder = another(run, tmp_path)
    source = report.write(folder, going=True).read_text(encoding="utf-8")
    refresh = data_of(source)["refresh"]
    assert refresh["every_s"] >= report.REFRESH_S and abs(refresh["written_s"] - time.time()) < 60
    assert "the run goes on" in Parts(source).text
    source = report.write(folder).read_text(encoding="utf-8")
    assert "refresh" not in data_of(source) and "the run goes on" not in Parts(source).text


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
    assert shown[0]["picture"] is None and len(shown) == samples.SAMPLES


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
        below = page.run(
            "document.querySelector('.tip:not([hidden])').getBoundingClientRect().bottom"
            " - document.querySelector('figure svg').getBoundingClientRect().top"
        )
        assert below <= 0 or y < 200  # above the curves, but where the screen ends there
        choose = "(s => { s.value = 'ordering'; s.dispatchEvent(new Event('change')) })"
        page.run(f"{choose}(document.querySelector('[name=puzzle]'))")
        page.run("document.querySelector('[name=back]').click()")
        heads = page.run("[...document.querySelectorAll('article h3')].map(e => e.textContent)")
        assert [int(re.search(r"step (\d+)", h)[1]) for h in heads] == list(range(9, 15))
        assert all(h.startswith("ordering, level 2") for h in heads)
        orderings = [s for s in data_of((run / "report.html").read_text())["samples"] if s["puzzle"] == "ordering"]
        drawn = "Promise.all([...document.querySelectorAll('article image')].map(e => e.decode().then(() => 1)))"
        assert sum(page.run(drawn)) == sum(s["question"].count("<image>") for s in orderings[8:14])
        page.run("document.querySelector('article .picture').click()")
        page.settle()
        shown = page.run(
            "(r => [r.width / innerWidth, r.height / innerHeight])"
            "(document.querySelector('dialog[open] svg').getBoundingClientRect())"
        )
        assert 0.8 < max(shown) <= 1
        page.run("document.querySelector('dialog').click()")
        page.settle()
        assert page.run("document.querySelectorAll('dialog').length") == 0
        choose = "(s => { s.value = 'the hardest'; s.dispatchEvent(new Event('change')) })"
        page.run(f"{choose}(document.querySelector('[name=order]'))")
        assert page.run("document.querySelectorAll('article').length") == 6
        assert not page.problems, page.problems
        assert not [url for url in page.requests if not url.startswith(("data:", run.as_uri()))]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")
def test_a_page_in_a_browser_follows_its_run_to_the_end(run, tmp_path, monkeypatch):
    """It loads itself again, keeps what was chosen, stays while somebody looks at a picture, and stops at the end."""
    monkeypatch.setattr(report, "REFRESH_S", 0.2)
    folder = another(run, tmp_path / "run", log={"report_every_s": 0.2})
    for name in ("samples.jsonl", "samples"):
        (folder / name).symlink_to(run / name)
    file = report.write(folder, going=True)
    with Page(file, tmp_path / "profile") as page:

        def within(seconds, condition):
            end = time.monotonic() + seconds
            while not page.run(condition) and time.monotonic() < end:
                time.sleep(0.05)
            return page.run(condition)

        page.run("window.old = true")
        choose = "(s => { s.value = 'ordering'; s.dispatchEvent(new Event('change')) })"
        page.run(f"{choose}(document.querySelector('[name=puzzle]'))")
        assert within(20, "document.readyState === 'complete' && !window.old")
        assert within(5, "document.querySelector('[name=puzzle]').value === 'ordering'")
        page.run("document.querySelector('.picture').click(); window.old = true")
        time.sleep(1.5)
        assert page.run("window.old && document.querySelectorAll('dialog[open]').length") == 1
        report.write(folder)
        page.run("document.querySelector('dialog').click()")
        assert within(20, "document.readyState === 'complete' && !window.old")
        page.run("window.old = true")
        time.sleep(1.5)
        assert page.run("window.old") and not page.problems, page.problems
        stale = file.read_text(encoding="utf-8").replace(
            '"samples":', '"refresh": {"every_s": 0.1, "written_s": 9, "stale_s": 60}, "samples":', 1
        )
        stale = stale.replace("<h1>", '<h1 id="refresh">', 1)
        file.write_text(stale, encoding="utf-8")
        page.call("Page.reload")
        assert within(20, "/nothing new for 1 minutes/.test(document.getElementById('refresh')?.textContent)")


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
    small = "200x90 px: the shorter side is under data.min_side 112"
    reasons = ["flat: almost no texture", small, small, "can't be decoded: truncated", small.replace("90", "80")]
    (run / "bad_images.txt").write_text("".join(f"{i}.jpg\t{reason}\n" for i, reason in enumerate(reasons)))
    assert "3 too small, 1 flat, 1 can't be decoded" in " ".join(Parts(report.page(run)).text.split())
    (run / "found.txt").unlink()
    (run / "bad_images.txt").unlink()
