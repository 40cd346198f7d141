"""bench/photos.py and its stages, at toy sizes: what is stopped goes on as if it had not been, each stage trains
what it says, and all of them together end in a result."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sslr1 import config, model, ops, puzzles
from tests.test_smol import TOWER, llama, smol, toy  # noqa: F401


@pytest.fixture
def photos(bench):
    bench("slices")
    return bench("photos")


@pytest.fixture
def folder(smol, llama, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(smol, "read", lambda path: toy(smol, llama))
    monkeypatch.setattr(smol, "VISION", smol.VISION | TOWER)
    return smol.build(tmp_path / "toy", "unused", side=112)


def efficientnet(seed=0) -> dict:
    """A state of EfficientNet-Lite0's names and shapes, random."""
    g, state = torch.Generator().manual_seed(seed), {}

    def conv(name, norm, out, inside, kernel):
        state[f"{name}.weight"] = (
            torch.randn(out, inside, kernel, kernel, generator=g) * (2 / (inside * kernel**2)) ** 0.5
        )
        state.update({f"{norm}.{key}": torch.ones(out) for key in ("running_var", "weight")})
        state.update({f"{norm}.{key}": torch.zeros(out) for key in ("running_mean", "bias")})

    conv("_conv_stem", "_bn0", 32, 3, 3)
    widths = [16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192, 320]
    for i, (kernel, width) in enumerate(zip([3, 3, 3, 5, 5, 3, 3, 3, 5, 5, 5, 5, 5, 5, 5, 3], widths)):
        before = widths[i - 1] if i else 32
        inner = 6 * before if i else before
        if i:
            conv(f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0", inner, before, 1)
        conv(f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1", inner, 1, kernel)
        conv(f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2", width, inner, 1)
    return state


def test_a_stopped_slice_goes_on_as_if_it_had_not_been(bench, tmp_path, seed):
    slices = bench("slices")

    def run(kept, stops=(), steps=9):
        torch.manual_seed(1)
        net, over = nn.Linear(4, 3), iter(stops)
        parameters, taken = dict(net.named_parameters()), []
        deadline = SimpleNamespace(over=lambda: len(taken) == left)
        rates = {"weight": 0.1, "bias": 0.01}

        def loss_at(step):
            taken.append(step)
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            return net(x).square().mean(), {}

        options = dict(kept=kept, made_by={"steps": steps}, deadline=deadline, say=lambda words: None)
        for left in (*over, None):
            if left is None:
                assert slices.train(parameters, rates, loss_at, steps, **options) > 0
            else:
                taken.clear()
                with pytest.raises(slices.OutOfTime, match="of 9"):
                    slices.train(parameters, rates, loss_at, steps, **options)
                net = nn.Linear(4, 3)  # another process, whose weights are anything
                parameters = dict(net.named_parameters())
                taken.clear()
        return taken, {name: p.detach().clone() for name, p in parameters.items()}

    _, whole = run(tmp_path / "whole.safetensors")
    taken, parts = run(tmp_path / "parts.safetensors", (4, 3))
    assert taken == [7, 8] and all(parts[name].equal(whole[name]) for name in whole)
    with pytest.raises(ValueError, match="begin in another folder"):
        run(tmp_path / "whole.safetensors", steps=10)


@pytest.mark.parametrize("narrow", [True, False])
def test_a_stage_multiplies_in_bfloat16_where_it_may(bench, tmp_path, narrow):
    slices, parameter, dtypes = bench("slices"), nn.Parameter(torch.eye(2)), []

    def loss_at(step):
        product = parameter @ parameter
        dtypes.append(product.dtype)
        return product.float().sum(), {}

    options = dict(kept=tmp_path / "s.safetensors", made_by={}, deadline=slices.Deadline(), say=lambda words: None)
    slices.train({"w": parameter}, {"w": 0.1}, loss_at, 2, narrow=narrow, **options)
    assert dtypes == [torch.bfloat16 if narrow else torch.float32] * 2 and parameter.dtype == torch.float32
    with pytest.raises(ValueError, match="begin in another folder"):
        slices.train({"w": parameter}, {"w": 0.1}, loss_at, 2, narrow=not narrow, **options)


def test_a_stage_s_notes_are_kept_and_end_it(bench, tmp_path):
    slices, parameter = bench("slices"), {"w": nn.Parameter(torch.ones(2))}

    def run(left):
        notes, taken = {"seen": 0}, []

        def loss_at(step):
            notes["seen"] += 1
            taken.append(step)
            return parameter["w"].square().sum(), {}

        options = dict(made_by={}, deadline=SimpleNamespace(over=lambda: len(taken) == left), say=lambda words: None)
        options |= dict(kept=tmp_path / "s.safetensors", notes=notes, over=lambda: notes["seen"] == 5)
        try:
            return slices.train(parameter, {"w": 0.1}, loss_at, 100, **options), notes, taken
        except slices.OutOfTime:
            return None, notes, taken

    assert run(3) == (None, {"seen": 3}, [0, 1, 2])
    seconds, *others = run(None)
    assert others == [{"seen": 5}, [3, 4]] and run(None) == (seconds, {"seen": 5}, [])


def test_the_teacher_sees_each_token_alone_or_beside_others(bench):
    """Canvases of one size go through it together; what is there is a row a visual token, in reading order."""
    reading = bench("reading")
    teacher = reading.Teacher(efficientnet())
    canvases = [torch.randint(0, 255, (h, w, 3), dtype=torch.uint8) for h, w in ((56, 84), (56, 56), (56, 84))]
    seen = teacher.targets(canvases, 28)
    assert seen.shape == (2 * 3 + 2 * 2 + 2 * 3, reading.SEEN)
    alone = torch.cat([teacher.targets([canvas], 28) for canvas in canvases])
    assert seen.std() > 0.01 and torch.allclose(seen, alone, atol=1e-4)
    resized = torch.nn.functional.interpolate(
        canvases[0].permute(2, 0, 1)[None].float(), (64, 96), mode="bilinear", antialias=True
    )
    fine, coarse = teacher(resized.round().clamp(0, 255).permute(0, 2, 3, 1))
    assert fine.shape == (1, 112, 4, 6) and torch.allclose(seen[4, 448:], coarse[0, :, 1, 1], atol=1e-4)
    assert torch.allclose(seen[4, :448].view(112, 4), fine[0, :, 2:, 2:4].flatten(1), atol=1e-4)


def test_things_to_compare(bench, folder):
    """Words alone at first; a candidate has the reference's tokens but for noise, and the others don't."""
    matching = bench("matching")
    network, tokenizer = model.load_model(folder), model.load_tokenizer(folder)
    matches = matching.Matches(network, tokenizer, seed=3, steps=24, batch=6)
    lengths, right = set(), 0
    for step in range(24):
        seen, rights = matches.draw(step)
        tokens = (seen.shape[1] - len(matches.ids)) // 5 + 1
        lengths.add(tokens)
        assert seen.shape[1] == len(matches.ids) + 5 * (tokens - 1) and (step >= 12 or tokens == 2)
        assert len(set(rights.tolist())) > 1 and matches.draw(step)[0].equal(seen)
        starts = [place + n * (tokens - 1) for n, place in enumerate(matches.places)]
        means = torch.stack([seen[:, start : start + tokens].mean(1) for start in starts], 1)
        like = torch.nn.functional.cosine_similarity(means[:, :1], means[:, 1:], dim=2)
        if step < 12:
            assert like.gather(1, rights[:, None]).min() > 0.7
            word = torch.nn.functional.cosine_similarity(means[0, 0][None], matches.words.detach()).max()
            assert word > 0.8, "a word of the vocabulary"
        right += (like.argmax(1) == rights).sum().item()
    assert lengths == {1, 2, 4, 9} and right > 0.8 * 24 * 6
    text = tokenizer.decode(matches.ids)
    assert text.endswith(r"\boxed{") and text.count(model.packing.IMAGE_PAD) == 5


def test_a_language_model_learns_to_compare(bench, folder, tmp_path):
    matching, slices = bench("matching"), bench("slices")
    own = dict(seed=0, steps=4, batch=4, kept=tmp_path / "m.safetensors", deadline=slices.Deadline())
    found = matching.match(folder, tmp_path / "out", **own)
    assert 4 <= found["steps"] <= 12 and found["right"].keys() == {"words", "vectors"}
    before, after = (model.load_model(path).state_dict() for path in (folder, tmp_path / "out"))
    moved = {name.split(".")[1] for name in before if not before[name].equal(after[name])}
    assert moved == {"language_model", "weight"} and (tmp_path / "out" / bench("tower").LAST).exists()


@pytest.mark.parametrize("steps, taken", [(4, 12), (20, 44)])
def test_comparing_goes_on_until_it_is_learnt(bench, folder, tmp_path, monkeypatch, steps, taken):
    """Right from step 30 on: seven of the last ten of either kind are right fourteen steps later. Three times its steps
    are the most. Stopped shortly before, it ends where it would have."""
    matching, slices = bench("matching"), bench("slices")

    def loss_at(matches, step):
        return 0 * matches.words.sum(), {"right": float(step >= 30)}

    monkeypatch.setattr(matching.Matches, "loss_at", loss_at)
    asked = iter(range(1000))
    own = dict(seed=0, steps=steps, batch=4, kept=tmp_path / "m.safetensors")
    with pytest.raises(slices.OutOfTime):
        stop = SimpleNamespace(over=lambda: next(asked) == taken - 3)
        matching.match(folder, tmp_path / "out", deadline=stop, **own)
    found = matching.match(folder, tmp_path / "out", deadline=slices.Deadline(), **own)
    assert found["steps"] == taken and found["right"] == dict.fromkeys(("words", "vectors"), 0.7 * (taken == 44))


def test_what_is_learnt_in_time_is_trained_as_if_there_were_no_more(bench, folder, tmp_path, monkeypatch):
    """How long it might have gone on moves no weight: the learning rate rises over its own steps."""
    matching, slices = bench("matching"), bench("slices")
    real = matching.Matches.loss_at
    monkeypatch.setattr(matching.Matches, "loss_at", lambda *given: (real(*given)[0], {"right": 1.0}))
    own, weights = dict(seed=0, steps=4, batch=2, deadline=slices.Deadline()), []
    for longest in (1, 20):
        monkeypatch.setattr(matching, "LONGEST", longest)
        kept, out = tmp_path / f"{longest}.safetensors", tmp_path / f"out-{longest}"
        assert matching.match(folder, out, kept=kept, **own)["steps"] == 4
        weights.append(model.load_model(out).state_dict())
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_grids_and_their_quarter_turns(bench, folder):
    """What follows a grid is the grid turned by what the answer says, but for noise; each answer's place is the token
    before it. A lesson is over when it is learnt, or has had its steps."""
    turning = bench("turning")
    network, tokenizer = model.load_model(folder), model.load_tokenizer(folder)
    lessons = dict.fromkeys(turning.LESSONS, 12)
    turns, told = turning.Turns(network, tokenizer, seed=2, lessons=lessons, batch=4), {}
    cosine = torch.nn.functional.cosine_similarity
    for step in range(sum(lessons.values())):
        name = turns.lesson(step)
        told.setdefault(name, set()).add(step // 12)
        if name == "matches":
            turns.note(step, name, 0.0)
            continue
        seen, positions, places, rights = turns.draw(step)
        assert positions.shape == (3, seen.shape[1]) and rights.shape == (len(seen), len(places))
        assert places[-1] == seen.shape[1] - 1 and turns.draw(step)[0].equal(seen)
        distances = torch.cdist(seen.flatten(0, 1), turns.words.detach()).unflatten(0, seen.shape[:2])
        exact = (distances.min(-1).values < 1e-3 * turns.length)[0]  # text has no noise
        runs = (~exact).int().diff(prepend=torch.zeros(1, dtype=torch.int))
        starts, ends = (runs == 1).nonzero().flatten().tolist(), (runs == -1).nonzero().flatten().tolist()
        (first, *others) = [seen[:, start:end] for start, end in zip(starts, ends)]
        side = round(first.shape[1] ** 0.5)
        assert side * side == first.shape[1] and len(others) == len(places)
        for n, other in enumerate(others):
            for grid, turned, turn in zip(first.unflatten(1, (side, side)), other, rights[:, n].tolist()):
                whole = torch.rot90(grid, -turn, (0, 1))
                own = whole[-1:, -1:] if name == "corner" else whole
                like = cosine(turned[None], grid.flatten(0, 1)[:, None], dim=2).argmax(0)
                assert cosine(own.flatten(0, 1), turned).mean() > 0.5 or len(like.unique()) < len(like)
            if n + 1 < len(others):  # the answer is shown before the next is asked
                shown = turns.words.detach()[turns.signs[rights[:, n]]]
                assert seen[:, places[n] + 1].equal(shown)
        turns.note(step, name, 0.0)
    new = turning.Turns(network, tokenizer, seed=2, lessons=turning.LESSONS, batch=4)
    for step in range(turning.WINDOW):
        assert new.notes["lesson"] == 0
        new.note(step, "corner", 1.0)
    assert new.notes["lesson"] == 1 and new.notes["since"] == turning.WINDOW
    kinds = {len(new.matches.draw(turning.matching.STEPS + step // turning.BEFORE)[0][0]) for step in range(5, 60, 6)}
    assert len(kinds) > 1 and new.asked_at(5, "matches")[0].isfinite()
    assert turns.over() and turns.notes["steps"] == {name: 12 * n + 12 for n, name in enumerate(lessons)}
    assert told == {"corner": {0, 1}, "small": {1, 2}, "large": {2, 3}, "puzzle": {3}, "matches": {0, 1, 2, 3}}


def test_the_last_lesson_asks_as_the_puzzle_does(bench, folder, scenes):
    from sslr1.data import ImageStore

    turning, tower = bench("turning"), bench("tower")
    tokenizer, spec = model.load_tokenizer(folder), ops.PatchSpec.from_pretrained(folder)
    images = ImageStore.scan(scenes, min_side=112).get(range(4))
    level = tower.LEVELS["rotation"]
    batch = puzzles.make(images, "rotation", level=level, spec=spec, thinking=False, wordings=1)
    turns = turning.Turns(model.load_model(folder), tokenizer, seed=0, lessons=turning.LESSONS, batch=2)
    for puzzle, prompt in zip(batch, model.prompts(batch, tokenizer)):
        assert puzzle.answer.text in turning.ANSWERS
        ids = [id for n, id in enumerate(prompt.input_ids.tolist()) if id != turns.pad or prompt.input_ids[n - 1] != id]
        assert ids == turns.asked
    turns.notes |= {"lesson": 3, "since": 7}
    last = 7 + turning.LESSONS["puzzle"] - 1
    prompts = [turns.prompt(last, torch.Generator().manual_seed(n)) for n in range(20)]
    assert turns.asked + turns.box in prompts and min(map(len, prompts)) < len(turns.asked)


def test_a_turned_picture_s_places(bench, folder, scenes):
    """The loss is least, and the corner right, where the turned picture's tokens are the upright one's, turned by what
    the puzzle's answer says."""
    from sslr1.data import ImageStore

    tower = bench("tower")
    images, spec = ImageStore.scan(scenes, min_side=112).get(range(8)), ops.PatchSpec.from_pretrained(folder)
    batch = puzzles.make(images, "rotation", level=tower.LEVELS["rotation"], spec=spec)
    assert len({tower.right_of(puzzle) for puzzle in batch}) > 1
    upright = torch.nn.functional.normalize(torch.randn(4, 4, 32), dim=2)
    for puzzle, pixels in zip(batch, batch.render()):
        turns = [torch.rot90(upright, -turn, (0, 1)) for turn in range(4)]
        losses = [tower.places_apart(puzzle, upright, turned).item() for turned in turns]
        own = min(range(4), key=losses.__getitem__)
        assert [tower.solved(puzzle, (upright, turned)) for turned in turns] == [turn == own for turn in range(4)]
        assert own == tower.right_of(puzzle)
        first, second = (canvas.float() for canvas in pixels)  # as the pixels themselves are turned
        assert torch.rot90(first, -own, (0, 1)).equal(second)


def test_the_tower_learns_to_tell_pictures_apart(bench, folder, scenes, tmp_path):
    tower, slices = bench("tower"), bench("slices")
    options = dict(seed=0, steps=2, batch=4, kept=tmp_path / "s.safetensors", count=4)
    found = tower.fit(folder, scenes, tmp_path / "out", tower.LEVELS, deadline=slices.Deadline(), **options)
    assert found["held_out"].keys() == tower.SHARES.keys() and found["seconds"] >= 0
    before, after = (model.load_model(path).state_dict() for path in (folder, tmp_path / "out"))
    moved = {name.split(".")[1] for name in before if not before[name].equal(after[name])}
    assert moved == {"visual"}
    assert model.load_tokenizer(tmp_path / "out").chat_template == model.load_tokenizer(folder).chat_template
    seer = tower.Seer(tmp_path / "out", scenes, tower.LEVELS, seed=0, batch=4, mixture=tower.SHARES)
    with torch.no_grad():
        drawn = [seer.see(seer.stream.get(step).prompts) for step in range(4)]
    seer.stream.close()
    seen = torch.cat([canvas.flatten(0, 1) for own in drawn for canvas in own])
    words = seer.words.norm(dim=1).mean()
    assert seen.mean(0).norm() < 1e-3 * words and abs(seen.norm(dim=1).mean() / words - 1) < 1e-3


def test_a_patch_embedding_begins_as_principal_components(bench, folder):
    """Their outputs on the patches are uncorrelated, each with its share of the variance to the power 2 KEEP."""
    tower = bench("tower")
    visual = model.load_model(folder).model.visual
    weight = visual.patch_embed.proj.weight
    rng = torch.Generator().manual_seed(5)
    spread = torch.logspace(0, -2, weight[0].numel())
    patches = 3.0 + torch.randn(8000, len(spread), generator=rng) * spread
    tower.first_weights(visual, patches, seed=0)
    seen = ((patches - patches.mean(0)) @ weight.detach().flatten(1).T).double()
    found = seen.T @ seen / len(seen)
    wanted = (spread[: len(weight)] / spread[0]).double() ** (4 * tower.KEEP)
    assert (found - found.diag().diag()).abs().max() < 1e-3 * found.diag().max()
    assert torch.allclose(found.diag(), wanted / wanted.mean(), rtol=0.15)
    first = {name: p.detach().clone() for name, p in visual.named_parameters()}
    tower.first_weights(visual, patches, seed=0)
    assert all(p.equal(first[name]) for name, p in visual.named_parameters())


def test_right_answers_are_taught(photos, bench, folder, scenes, tmp_path):
    """The text of an answer becomes likelier; a stopped stage goes on; a thought says what its answer says."""
    tower, slices = bench("tower"), bench("slices")
    losses, own = [], {"steps": 12, "batch": 4, "captions": 0.25, "rate": 3e-3}
    inner = photos.train

    def spy(parameters, rates, loss_at, steps, **options):
        def noted(step):
            loss, told = loss_at(step)
            losses.append(loss.item())
            return loss, told

        assert parameters and not any(".visual." in name for name in parameters) and not options["narrow"]
        return inner(parameters, rates, noted, steps, **options)

    photos.train = spy
    told = dict(seed=0, thinking=True, taught=own, kept=tmp_path / "t.safetensors", deadline=slices.Deadline())
    found = photos.teach(folder, scenes, tmp_path / "out", **told)
    assert found["tokens_per_second"] > 0 and losses[-1] < 0.8 * losses[0]
    before, after = (model.load_model(path).model for path in (folder, tmp_path / "out"))
    assert all(a.equal(b) for a, b in zip(before.visual.parameters(), after.visual.parameters()))
    assert not all(a.equal(b) for a, b in zip(before.parameters(), after.parameters()))
    assert (tmp_path / "out" / tower.LAST).exists() and photos.perplexity(tmp_path / "out") > 1


def test_what_is_shown(photos, folder, scenes):
    from sslr1.data import ImageStore

    tokenizer, spec = model.load_tokenizer(folder), ops.PatchSpec.from_pretrained(folder)
    images = ImageStore.scan(scenes, min_side=112).get(range(8))
    for name in photos.SHARES:
        batch = puzzles.make(images, name, level=1, spec=spec, thinking=True)
        for puzzle, prompt in zip(batch, model.prompts(batch, tokenizer)):
            thought = photos.shown(puzzle, prompt, tokenizer, "", True, False)
            score = puzzles.score(puzzle.answer, thought.samples[0].text)
            assert score.exact and score.format_ok, thought.samples[0].text
            assert puzzle.answer.text in photos.caption(puzzle)
            plain = photos.shown(puzzle, prompt, tokenizer, "", False, False)
            assert puzzles.score(puzzle.answer, plain.samples[0].text, thinking=False).exact
            assert plain.samples[0].tokens[-1] == tokenizer.eos_token_id and plain.prompt is prompt
            told = photos.shown(puzzle, prompt, tokenizer, "", False, True)
            assert told.samples[0].text == photos.caption(puzzle) and "boxed" not in tokenizer.decode(
                told.prompt.input_ids
            )
            pad = tokenizer.convert_tokens_to_ids(model.packing.IMAGE_PAD)
            assert (told.prompt.input_ids == pad).sum() == (prompt.input_ids == pad).sum()


def test_stages_of_an_older_recipe_are_refused(photos, tmp_path):
    for name in ("cold", "matched", "seeing"):
        (tmp_path / f"{name}.json").write_text("{}")
    with pytest.raises(SystemExit, match="an older recipe: move it away"):
        photos.small(photos.Book(tmp_path), SimpleNamespace(run="direct", toy=True), None)


def test_every_run_is_a_configuration(photos):
    for run, (thinking, *_) in photos.RUNS.items():
        small = config.check(photos.settings(run, "m", "d", 3))
        assert small.puzzles.thinking == thinking and small.train.seed == 3 and small.log.name == run
        assert small.puzzles.mixture == photos.SHARES
        real = config.check(photos.settings(run, "m", "d", 3, steps=7, real=True))
        assert real.train.steps == 7 and real.model.path == "m" and real.puzzles.max_pixels
    assert config.check(photos.settings("lora", "m", "d", 0)).model.lora.rank == 16
    assert photos.SMALL["optim"]["lr"] == 2e-5, "nothing of a run's own stays in what they share"


@pytest.mark.parametrize("program, ends", [("time.sleep(60)", "OutOfTime"), ("sys.exit(3)", "RuntimeError")])
def test_how_a_slice_of_training_ends(photos, tmp_path, monkeypatch, program, ends):
    """By our own signal, however early it comes, or of itself."""
    inner = subprocess.Popen
    monkeypatch.setattr(
        photos.subprocess,
        "Popen",
        lambda call, **options: inner([call[0], "-S", "-c", f"import sys, time; {program}"], **options),
    )
    told = photos.settings("direct", "m", "d", 0, tmp_path)
    with pytest.raises(Exception, match=r"step 0 of 200|failed; see") as found:
        photos.learn("direct", told, photos.Deadline(0.5 / 3600), tmp_path / "log")
    assert type(found.value).__name__ == ends
    with pytest.raises(photos.OutOfTime, match="not begun"):
        photos.learn("direct", told, photos.Deadline(0), tmp_path / "log")


def test_grey_is_all_that_is_seen(bench, monkeypatch, draw):
    grey = bench("grey")
    images = torch.from_numpy(draw.integers(0, 255, (3, 120, 160, 3), dtype="uint8"))
    batch = puzzles.make(images, "ordering", level=1, thinking=False)
    seen, sizes = batch.render_patches()
    monkeypatch.setattr(puzzles.batch.PuzzleBatch, "render_patches", grey.blind)
    blind, same = batch.render_patches()
    assert same.equal(sizes) and blind.shape == seen.shape and not blind.any() and seen.any()


def test_where_letters_and_rings_are_looked_at(bench, folder, scenes, monkeypatch):
    reading = bench("reading")
    monkeypatch.setattr(reading.Teacher, "packaged", lambda: reading.Teacher(efficientnet()))
    stamp = reading.Plan.stamp
    found = reading.look(folder, scenes, 112, 1.0, 16)
    assert found["puzzles"] == 16 and 0 <= found["read"] <= 1 and found["label_px"] == 15.7
    assert reading.Plan.stamp is stamp
    image = torch.zeros(300, 300, 3, dtype=torch.uint8)
    image[::7, ::5] = 90
    with reading.Labels() as labels:
        (puzzle,) = puzzles.make([image], "correspondence", level=1, thinking=False)
    places, canvas = labels.places[id(puzzle.plan)], puzzle.render()[1]
    assert places.keys() == set("ABCD")
    for (y, x), ring in zip((places[name] for name in "ABCD"), puzzle.points[1] * len(canvas)):
        assert (canvas[int(y) - 6 : int(y) + 7, int(x) - 6 : int(x) + 7] > 230).any()  # ink
        assert torch.tensor([y - ring[0], x - ring[1]]).norm() < 0.25 * len(canvas)
    grid = torch.arange(6 * 6).view(6, 6, 1)
    assert reading.at(grid, [[0.01, 0.99], [0.5, 0.34]]).flatten().tolist() == [5, 20]


def test_a_linear_layer_reads_what_can_be_read(bench, seed):
    reading = bench("reading")
    letters = torch.arange(4).repeat(80, 1)
    features = torch.randn(80, 4, 20)
    assert reading.read(features, letters, 0) < 0.5
    features[:, :, :4] += 3 * torch.eye(4)
    assert reading.read(features, letters, 0) > 0.8


@pytest.mark.slow
def test_from_the_folder_to_the_result(photos, folder, scenes, tmp_path, monkeypatch, capsys):
    """All stages with two steps each, by the trainer itself; a second call makes nothing again."""
    monkeypatch.setattr(photos, "FOLDER", tmp_path / "runs")
    call = ["--images", str(scenes), "--gguf", "unused", "--toy"]
    for run in ("direct", "grey", "thinking"):
        assert photos.main([*call, "--run", run]) == 0
    found = json.loads((tmp_path / "runs" / "smollm2-seed-0" / "direct" / "result.json").read_text())
    assert len(found["held_out"]) == 2 and found["held_out"][1]["correspondence"]["n"] == 4
    assert found["steps"] == 2 == len(found["curves"]["entropy"]) and found["hours"]["direct"] > 0
    assert found["hours"].keys() >= {"cold", "matched", "turned", "seeing", "taught-direct"}
    assert found["stages"].keys() == {"cold", "matched", "turned", "seeing", "taught"}
    assert found["stages"]["cold"]["perplexity"] > 1 < found["perplexity_after"] and found["versions"]["torch"]
    assert any("wrote" in own["first"] for own in found["samples"].values())
    before = (tmp_path / "runs" / "smollm2-seed-0" / "taught-direct" / "model.safetensors").stat().st_mtime_ns
    assert photos.main(call) == 0
    assert (tmp_path / "runs" / "smollm2-seed-0" / "taught-direct" / "model.safetensors").stat().st_mtime_ns == before
    assert (
        photos.main([*call, "--seed", "1", "--hours", "0"]) == 1
        and "the same command goes on" in capsys.readouterr().out
    )


def test_tables_say_what_was_found(bench, tmp_path):
    first, photos = bench("first"), bench("photos")

    def result(run, seed, before, after, **own):
        def asked(step, share):
            return {"step": step} | {name: {"exact": share, "chance": 0.25, "n": 400} for name in photos.SHARES}

        sample = {"step": 1, "question": "?", "answer": "B", "wrote": ["a|`b`\n" + 200 * "x"]}
        curves = {"format": [0.0] * 10 + [1.0] * 10, "length": [8.0] * 20, "entropy": [2.0] * 10 + [1.0] * 10}
        found = {
            **{"run": run, "seed": seed, "steps": 20, "config": {"puzzles": {"levels": photos.tower.LEVELS}}},
            **{"held_out": [asked(0, before), asked(20, after)], "curves": curves, "perplexity_after": 15.0},
            **{"stages": {"cold": {"perplexity": 9.0}, "taught": {"perplexity": 12.0}}, "alarms": {}},
            **{"hours": {"cold": 0.01, "turned": 0.13, "seeing": 0.25, "taught-direct": 0.5, run: 0.75}},
            **{"mean_s_a_step": {"step": 13.5}},
            **{"samples": {"rotation": {"first": sample, "last": sample | {"step": 20, "wrote": [""]}}}},
        }
        (tmp_path / f"lm-smollm2-{run}-{seed}-here.json").write_text(json.dumps(found | own))

    assert first.load(tmp_path, "here") == [] and first.text(first.accuracy, []) == "Not run yet."
    for seed, after in enumerate((0.5, 0.52, 0.48)):
        result("direct", seed, 0.3, after)
    result("grey", 0, 0.25, 0.25)
    result("hot", 0, 0.3, 0.0, alarms={"alarm/entropy": 31})
    runs = first.load(tmp_path, "here")
    assert [run["run"] for run in runs] == ["direct"] * 3 + ["grey", "hot"]
    lines = first.text(first.accuracy, runs).splitlines()
    assert (
        lines[2].startswith("| rotation | 1 | 25.0% | 30.0% [")
        and lines[2].endswith("48.0 | +20.0 [+15.0, +25.0] | **yes** | 3 of 3 |")
        and len(lines) == 7
    )
    _, (direct, grey) = first.controls(runs)
    assert direct[:4] == ["direct", "3", "20", "30% → 50% (+20 ± 2)"] and grey[3] == "25% → 25% (+0 ± 3)"
    _, (row, _) = first.english(runs)
    assert row == ["direct", "0% → 100%", "8.0 → 8.0", "2.00 → 1.00", "9.0", "12.0", "15.0"]
    _, (begun, ended) = first.written(runs)
    assert begun[2:4] == ["1", "`B`"] and begun[4].startswith(r"`a\|'b' xxx") and begun[4].endswith("…`")
    assert ended[4] == "(nothing)"
    _, raised = first.alarms(runs)
    assert raised[-1] == ["`optim.lr=1e-3`", "0", "20", "entropy, step 31"] and raised[0][3] == "none"
    assert first.cost(runs)[1][0] == ["direct", "0", "0.14", "0.25", "0.50", "0.75", "13.5"]
