"""The puzzles in other people's trainers: signatures as those call them, without what they don't need."""

import importlib.util
import json
import math
import os
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import sslr1
from sslr1.data import Decoder, ImageFolder, ImageStore, Pool
from sslr1.integrations import easyr1, ms_swift, trl, truth, verl
from sslr1.puzzles import Answer, random_answer_text, score
from tests.conftest import ROOT

ANSWERS = [
    Answer("number", 270, (0, 90, 180, 270)),
    Answer("choice", "C", ("A", "B", "C", "D")),
    Answer("sequence", (3, 1, 4, 2, 6, 5)),
]


def says(text, thinking=True):
    return ("<think>Look.</think> " if thinking else "") + f"\\boxed{{{text}}}"


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda a: a.kind)
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("rule", ["default", "paper"])
def test_every_trainer_gets_the_score_of_the_puzzle(answer, thinking, rule, draw):
    packed = truth.pack(answer, thinking)
    assert Answer.from_dict(json.loads(packed)) == answer
    texts = [says(answer.text, thinking), says(answer.text, not thinking), "", "\\boxed{"]
    texts += [says(random_answer_text(answer, draw), thinking) for _ in range(8)]
    expected = [score(answer, text, rule, thinking) for text in texts]
    assert expected[0].exact == 1 and expected[1].format_ok != thinking and expected[2].reward == 0
    rewards = [e.reward for e in expected]

    columns = {"prompts": ["?"] * len(texts), "completion_ids": [[0]] * len(texts), "trainer_state": None, "level": [2]}
    answers = [packed] * len(texts)
    assert trl.reward(completions=texts, answer=answers, rule=rule, **columns) == rewards
    spoken = [[{"role": "assistant", "content": text}] for text in texts]
    assert trl.reward(completions=spoken, answer=answers, rule=rule, **columns) == rewards
    parts = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in texts]
    assert trl.reward(completions=parts, answer=answers, rule=rule, **columns) == rewards
    assert ms_swift.reward(texts, solution=answers, rule=rule, **columns) == rewards
    for text, e in zip(texts, expected):
        found = verl.compute_score(
            data_source="sslr1/any", solution_str=text, ground_truth=packed, extra_info={"index": 0}, rule=rule, more=1
        )
        assert found == {"score": e.reward, "acc": e.exact, "format": float(e.format_ok)}
    batch = [{"response": text, "response_length": 3, "ground_truth": packed} for text in texts]
    scores = [{"overall": e.reward, "accuracy": e.exact, "format": float(e.format_ok)} for e in expected]
    assert easyr1.compute_score(batch, rule=rule) == verl.compute_score(batch, rule=rule) == scores


@pytest.mark.parametrize("opened", [None, True, False])
def test_a_thought_that_the_chat_template_opened(opened):
    """Thinking models' templates write <think> themselves: completions begin within it."""
    answer = ANSWERS[0]
    packed, options = truth.pack(answer), {} if opened is None else {"opened": opened}
    behind, whole = f"It lies on its side.\n</think>\n\n{says('270', False)}", says("270")
    for text, due in (
        (behind, opened is not False),
        (whole, opened is not True),
        (f"in <think></think>. {behind}", opened is not False),
        (says("270", False), False),
        (f"{behind}</think>", False),
        (f"It may be {says('90', False)}, but", False),
    ):
        expected = [float(due)]
        assert trl.reward([text], [packed], **options) == ms_swift.reward([text], [packed], **options) == expected, text
        assert [verl.compute_score("sslr1/x", text, packed, **options)["score"]] == expected
        one = {"response": text, "ground_truth": packed}
        assert [r["overall"] for r in easyr1.compute_score([one], **options)] == expected
    direct = truth.pack(answer, thinking=False)
    assert trl.reward([says("270", False)], [direct], **options) == [1.0]
    unfinished = verl.compute_score("sslr1/x", f"Is it {says('270', False)}? But", packed, opened=True)
    assert (unfinished["score"], unfinished["acc"]) == (0.0, 0.0)


def test_truth_is_taken_in_any_form():
    answer = ANSWERS[0]
    for form in (answer, answer.to_dict(), json.dumps(answer.to_dict()), truth.pack(answer)):
        assert truth.scored(form, says("270")).reward == 1.0
        assert truth.scored(form, says("270", thinking=False)).reward == 0.0
    assert trl.reward([[]], [truth.pack(answer)]) == [0.0]


def test_rewards_need_no_torch_and_load_from_their_paths():
    """As verl and EasyR1 load them: by the file's path, under a name of theirs."""
    code = (
        "import importlib.util, sys\n"
        "for name in ('torch', 'numpy', 'PIL', 'datasets', 'pyarrow', 'transformers'): sys.modules[name] = None\n"
        "import sslr1.integrations.trl, sslr1.integrations.ms_swift\n"
        "for path in sys.argv[1:]:\n"
        "    spec = importlib.util.spec_from_file_location('custom', path)\n"
        "    module = importlib.util.module_from_spec(spec)\n"
        "    spec.loader.exec_module(module)\n"
        "    print(module.compute_score([{'response': r'\\boxed{A}', 'ground_truth': "
        '\'{"kind": "choice", "value": "A", "thinking": false}\'}]))\n'
    )
    done = subprocess.run(
        [sys.executable, "-c", code, verl.__file__, easyr1.__file__], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == "[{'overall': 1.0, 'accuracy': 1.0, 'format': 1.0}]\n" * 2, done.stderr
    assert sslr1.integrations.trl.reward is trl.reward


def test_a_pool_is_taken_as_it_is(scenes):
    """What examples/trl_grpo.py gives to `trl.dataset`: Pictures that a store decodes when they are asked for."""
    pool = Pool(ImageStore(ImageFolder.scan(scenes), Decoder("pillow"), 112), range(4))
    pixels = trl._Pixels(pool)
    assert len(pixels) == 4 and isinstance(pixels[1], sslr1.puzzles.Picture)
    assert sslr1.puzzles.make([pixels[1]], "rotation", pool=pixels).canvas_counts == [1]


@pytest.mark.peer
def test_a_data_set_for_trl(scenes, photographs):
    """Of tensors and PIL images alike; its rows say which puzzles they are, and solve to reward 1."""
    from datasets import Dataset

    pictures = [Image.fromarray(p.numpy()) for p in photographs]
    found = trl.dataset(pictures, ("rotation", "ordering"), level=[1, 2], count=9, seed=3)
    assert isinstance(found, Dataset) and len(found) == 9
    again = trl.dataset(photographs, ("rotation", "ordering"), level=[1, 2], count=9, seed=3)
    assert [(r["puzzle"], r["level"]) for r in found][:5] == [
        ("rotation", 1),
        ("rotation", 2),
        ("ordering", 1),
        ("ordering", 2),
        ("rotation", 1),
    ]
    for row, same in zip(found, again):
        assert row == same
        puzzle, seed, epoch, attempt, index = row["id"].split("/")
        made = sslr1.puzzles.make(
            [photographs[int(index)]],
            row["puzzle"],
            level=row["level"],
            seed=int(seed),
            epoch=int(epoch),
            attempt=int(attempt),
            index=[int(index)],
            pool=photographs,
        )
        (canvases,) = made.render()
        assert all(np.array_equal(np.asarray(a), b.numpy()) for a, b in zip(row["images"], canvases, strict=True))
        parts = row["prompt"][0]["content"]
        assert "".join(p["text"] or "<image>" for p in parts) == made.questions[0]
        assert trl.reward([says(made.answers[0].text)], [row["answer"]]) == [1.0]
    assert {row["id"] for row in trl.dataset(photographs, "rotation", seed=4)}.isdisjoint(row["id"] for row in found)


@pytest.mark.peer
def test_the_trl_example_trains(tiny, scenes, tmp_path):
    """TRL's own trainer on the puzzles: it calls our reward with the answers of what it showed, and steps on what that
    gives."""
    spec = importlib.util.spec_from_file_location("trl_grpo", ROOT / "examples" / "trl_grpo.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    seen = []

    def reward(completions, answer, id, **columns):
        """Ours, and the share of different characters, without which a group of random babble has no gradient."""
        seen.append((completions, answer, id))
        rewards = trl.reward(completions, answer=answer, **columns)
        solved = [[{"role": "assistant", "content": says(Answer.from_dict(json.loads(a)).text, False)}] for a in answer]
        assert trl.reward(solved, answer=answer, **columns) == [1.0] * len(answer)
        texts = [completion[0]["content"] for completion in completions]
        assert rewards == [score(json.loads(a), text, thinking=False).reward for a, text in zip(answer, texts)]
        return [r + len(set(text)) / max(1, len(text)) for r, text in zip(rewards, texts)]

    trainer = example.train(
        scenes,
        tiny,
        tmp_path,
        steps=2,
        count=10,
        min_side=112,
        thinking=False,
        reward=reward,
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=12,
        save_strategy="no",
    )
    assert len(seen) == 2 and all(len(set(ids)) == 1 and len(ids) == 4 for _, _, ids in seen)
    shown = {row["id"]: row["answer"] for row in trainer.train_dataset}
    assert all(shown[i] == a for _, answers, ids in seen for a, i in zip(answers, ids))
    steps = [line for line in trainer.state.log_history if "loss" in line]
    assert len(steps) == 2 and all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in steps)


def test_the_loop_example_runs():
    done = subprocess.run(
        [sys.executable, "examples/ops_in_your_loop.py"], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0 and done.stdout.count("→") == 10, done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.sh")), ids=lambda p: p.name)
def test_scripts_parse(path):
    subprocess.run(["bash", "-n", path], check=True)


def test_scripts_name_columns_that_exist():
    easy, of_verl = ((ROOT / "examples" / name).read_text() for name in ("easyr1.sh", "verl.sh"))
    for key in ("prompt", "answer", "image"):
        column = easy.split(f"data.{key}_key=")[1].split()[0]
        assert column in easyr1.COLUMNS
    assert of_verl.split("data.image_key=")[1].split()[0] in verl.COLUMNS


def test_the_image_has_what_it_copies():
    lines = [line.split() for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY")]
    for _, *sources, _ in lines:
        assert all((ROOT / source).exists() for source in sources)


@pytest.mark.slow
def test_the_slurm_example_stops_and_goes_on(tiny, scenes, tmp_path):
    """Slurm's commands are stand-ins; torchrun, its ranks and their checkpoints are real."""
    commands = tmp_path / "bin"
    commands.mkdir()
    stand_ins = {
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
        "scontrol": f'[ "$1" = requeue ] && echo "$2" >> {tmp_path}/requeued || echo localhost',
        "srun": f'while [ "${{1#--}}" != "$1" ]; do shift; done; echo $$ > {tmp_path}/task; exec "$@"',
    }
    for name, line in stand_ins.items():
        (commands / name).write_text(f"#!/bin/bash\n{line}\n")
        (commands / name).chmod(0o755 | stat.S_IXUSR)
    environment = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[1-1]",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "PORT": "0",
    }
    settings = {
        "model.path": tiny,
        "data.path": scenes,
        "data.min_side": 112,
        "log.dir": tmp_path,
        "log.name": "run",
        "rollout.prompts": 8,
        "rollout.group_size": 2,
        "train.warmup.steps": 0,
        "train.steps": 10_000,
        "eval.count": 8,
        "checkpoint.every": 10_000,
    }
    command = ["bash", "examples/slurm.sh", "configs/tiny.yaml", *(f"{k}={v}" for k, v in settings.items())]

    def start():
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def stop(job, after):
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while not metrics.exists() or f'"step": {after}' not in metrics.read_text():
            assert time.monotonic() < deadline and job.poll() is None, job.communicate()[0].decode()[-3000:]
            time.sleep(0.2)
        task = (tmp_path / "task").read_text().strip()
        subprocess.run(["pkill", "-USR1", "-P", task], check=True)  # some of Slurm's settings signal torchrun too
        os.kill(int(task), signal.SIGUSR1)
        shown = job.communicate(timeout=240)[0].decode()
        assert job.returncode == 0, shown[-3000:]
        return shown, max(tmp_path.glob("run/checkpoints/step-*")).name

    _, first = stop(start(), 2)
    assert (tmp_path / "requeued").read_text() == "77\n" and int(first[5:]) >= 2
    shown, second = stop(start(), int(first[5:]) + 2)
    assert f"going on from {tmp_path / 'run' / 'checkpoints' / first}" in shown.replace("\n", "") and second > first
    assert (tmp_path / "requeued").read_text() == "77\n77\n"
    job = subprocess.run([*command, "model.path=/nowhere"], cwd=ROOT, env=environment, capture_output=True)
    assert job.returncode not in (0, 75) and (tmp_path / "requeued").read_text() == "77\n77\n"
