import asyncio
import base64
import io
import json
import math
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from PIL import Image

from common.tiling import select_grid
from demo import evaluate, scenes
from demo.evaluate import CURVE, ROUTER, STYLES, TASKS, Answers, Failed, Group, Record, Setting
from demo.scenes import Scene, Shape, Style
from demo.words import Asked
from vision_worker.preprocessing.tiling import cut

PICTURE = Scene(1000, 500, "plain", (220, 220, 220), (Shape("square", "red", (10.0, 10.0, 90.0, 90.0)),))
TILES = 3  # of it, with its thumbnail


class Server(threading.Thread):
    """A gateway in OpenAI's shape on 127.0.0.1: it answers what `say` says, and counts tiles as a gateway does."""

    def __init__(self, say: Callable[[str], str]) -> None:
        super().__init__(daemon=True)
        self.say = say
        self.bodies: list[dict[str, Any]] = []
        self.heeds = True
        self.failures: list[web.Response] = []
        self.busy = self.busiest = 0
        self.before: Callable[[], None] = lambda: None
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()
        self.url = ""

    def run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._up.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/v1/models", _always({"object": "list", "data": [{"id": "tiny", "object": "model"}]}))
        app.router.add_get("/version", _always({"version": "9.9", "engine": "8.8"}))
        app.router.add_post("/v1/chat/completions", self._chat)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = "http://{}:{}".format(*runner.addresses[0][:2])

    def begin(self) -> None:
        self.start()
        assert self._up.wait(20)

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.join(20)
        self._loop.close()

    async def _chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        self.before()
        if self.failures:
            return self.failures.pop(0)
        self.busy += 1
        self.busiest = max(self.busiest, self.busy)
        await asyncio.sleep(0.005)
        self.busy -= 1
        files = [base64.b64decode(part["image_url"]["url"].split(",")[1]) for part in _parts(body, "image_url")]
        tokens = sum(_tokens(_tiles(file), body.get("vir") if self.heeds else None) for file in files)
        report = {"X-DvD-Images": f"images={len(files)}; tiles=0; compressed=0; tokens={tokens}; reused=0"} if files else {}
        message = {"role": "assistant", "content": self.say(asked_in(body))}
        answer = {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        return web.json_response(answer, headers=report)


def _always(value: Any) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response(value)

    return answer


def _tiles(file: bytes) -> int:
    with Image.open(io.BytesIO(file)) as image:
        count = math.prod(select_grid(image.width, image.height, Style().tiling))
    return count + (count > 1)


def _tokens(tiles: int, vir: dict[str, Any] | None) -> int:
    """Visual tokens; of mode auto the more, the higher its absolute threshold is."""
    if not vir or vir["mode"] == "off":
        return 256 * tiles
    compressed = tiles if vir["mode"] == "all" else round((tiles - 1) * (1 - vir.get("absolute_threshold", 0.5)))
    return 256 * tiles - 192 * int(compressed)


def _parts(body: dict[str, Any], kind: str) -> list[Any]:
    content = body["messages"][-1]["content"]
    return [part for part in content if part["type"] == kind] if isinstance(content, list) else []


def asked_in(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else str(_parts(body, "text")[0]["text"])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(evaluate, "PAUSES", (0.01, 0.01))
    made = Server(lambda _: "yes")
    made.begin()
    yield made
    made.end()


def groups(count: int, *asked: tuple[str, str], settings: tuple[Setting, ...] = (evaluate.SERVERS,)) -> list[Group]:
    questions = tuple(Asked("count", question, answer) for question, answer in asked)
    return [Group("router", i, questions, (PICTURE,), settings=settings) for i in range(count)]


def ask(server: Server, planned: list[Group], file: Path, in_flight: int = 2) -> list[Record]:
    """What all of them are answered, the file's answers included."""

    async def run() -> list[Record]:
        async with aiohttp.ClientSession() as session:
            client = evaluate.Client(session, server.url)
            await client.describe()
            with Answers(file, client.model) as answers:
                await evaluate.ask_all(client, "part", planned, answers, in_flight)
                return answers.of(planned)

    return asyncio.run(run())


# What is asked


def test_each_task_is_asked_as_often_as_told_and_no_question_twice() -> None:
    planned = list(evaluate.plan_accuracy(7, 12))
    for name, style in STYLES.items():
        mine = [group for group in planned if group.stream in (name, f"{name} pairs")]
        tasks = [asked.task for group in mine for asked in group.asked]
        assert {task: tasks.count(task) for task in TASKS} == dict.fromkeys(TASKS, 7)
        assert all(group.style == style for group in mine)
        assert {scene.texture for group in mine for scene in group.scenes} <= set(style.textures)
    pairs = [group for group in planned if group.stream.endswith("pairs")]
    assert all(len(group.scenes) == 2 for group in pairs)
    assert all(group.scenes[0].seed != group.scenes[1].seed for group in pairs if group.asked[0].answer == "no")
    assert all((group.scenes[0] == group.scenes[1]) == (group.asked[0].answer == "yes") for group in pairs)
    near = [group for group in planned if group.stream.endswith("near")]
    assert [group.asked[0].answer for group in near] == ["no", "no"]
    assert all(first.seed == second.seed for first, second in (group.scenes for group in near))
    text = [asked for group in planned if group.stream == "text" for asked in group.asked]
    assert len({asked.question for asked in text}) == 12
    assert [asked.task for asked in text].count("no image") == 4
    names = [item.name for group in planned for item in group.items]
    assert len(set(names)) == len(names)


def test_a_plan_is_the_same_every_time_and_longer_ones_begin_with_it() -> None:
    def pairs(n: int) -> list[Group]:
        return [group for group in evaluate.plan_accuracy(n, 1) if group.stream == "trained pairs"]

    assert pairs(4) == pairs(6)[:4]
    assert list(evaluate.plan_router(3, ROUTER)) == list(evaluate.plan_router(5, ROUTER))[:3]


def test_pictures_for_the_router_have_many_tiles_and_mostly_numbers() -> None:
    planned = list(evaluate.plan_router(30, CURVE))
    assert all(group.full > 256 for group in planned)
    with_number = [any(asked.task == "number" for asked in group.asked) for group in planned]
    assert all(with_number[i] for i in range(30) if i % 5)
    assert all(len(group.items) == len(CURVE) * len(group.asked) for group in planned)
    assert len({repr(group.scenes) for group in planned}) == 30


def test_seeds_differ_from_those_of_training_and_from_one_another() -> None:
    seen = {tuple(evaluate.generator(stream, i).integers(2**31, size=4)) for stream in evaluate.STREAMS for i in range(3)}
    assert len(seen) == 3 * len(evaluate.STREAMS)
    assert evaluate.SEED > 2**30


def test_equal_scenes_become_equal_files() -> None:
    for index in range(6):  # some are PNG, some are JPEG
        first, second = evaluate.data_urls(Group("trained pairs", index, (), (PICTURE, PICTURE)))
        assert first == second
        data = base64.b64decode(first.split(",")[1])
        assert len(cut(data, Style().tiling)) == TILES
        assert first.startswith("data:image/png") == data.startswith(b"\x89PNG")


def test_a_request_is_greedy_and_has_the_images_before_the_text(server: Server, tmp_path: Path) -> None:
    planned = [
        Group("text", 0, (Asked("small talk", "Hello", "yes"),)),
        Group("trained pairs", 0, (Asked("same", "Same?", "yes"),), (PICTURE, PICTURE)),
        Group("router", 0, (Asked("count", "How many?", "1"),), (PICTURE,), settings=(ROUTER[0], CURVE[-1])),
    ]
    ask(server, planned, tmp_path / "a", in_flight=1)
    text, two, off, moved = server.bodies
    for body in server.bodies:
        assert body["temperature"] == 0
        assert body["model"] == "tiny"
    assert text["messages"] == [{"role": "user", "content": "Hello"}]
    assert [part["type"] for part in two["messages"][0]["content"]] == ["image_url", "image_url", "text"]
    assert "vir" not in text
    assert "vir" not in two
    assert off["vir"] == {"mode": "off"}
    assert moved["vir"] == {"mode": "auto", "relative_threshold": 0.8, "absolute_threshold": 0.5}


# Answers


@pytest.mark.parametrize(
    ("said", "right"),
    [("12", True), (" 12\n", True), ("12.", False), ("1 2", False), ("", False), ("twelve", False), ("012", False)],
)
def test_an_answer_is_right_if_it_is_the_expected_text(server: Server, tmp_path: Path, said: str, right: bool) -> None:
    server.say = lambda _: said
    (record,) = ask(server, groups(1, ("How many?", "12")), tmp_path / "a")
    assert record.right == right
    assert record.answer == said


def test_all_is_asked_and_counted(server: Server, tmp_path: Path) -> None:
    server.say = lambda question: {"a": "1", "b": "2", "c": "x"}[question]
    records = ask(server, groups(6, ("a", "1"), ("b", "2"), ("c", "3"), settings=ROUTER), tmp_path / "a", in_flight=4)
    assert len(records) == len(server.bodies) == 54
    assert 2 <= server.busiest <= 4
    found = evaluate.per_setting(records, ROUTER)["settings"]
    assert [one["kept"] for one in found] == [1.0, 0.75, 0.25]  # of three tiles one is compressed in the middle
    assert [one["pictures"] for one in found] == [6, 6, 6]
    for one in found:
        assert one["tasks"]["all"] == one["tasks"]["count"]
        assert one["tasks"]["all"]["n"] == 18
        assert one["tasks"]["all"]["right"] == 12


def test_questions_about_one_image_are_asked_one_after_another(server: Server, tmp_path: Path) -> None:
    ask(server, groups(1, *((str(i), "") for i in range(6))), tmp_path / "a", in_flight=4)
    assert server.busiest == 1
    assert [asked_in(body) for body in server.bodies] == [str(i) for i in range(6)]


def test_what_was_answered_is_not_asked_again(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "answers"
    server.say = lambda question: question
    first = ask(server, groups(2, ("a", "a"), ("b", "z")), file)
    server.bodies.clear()
    more = ask(server, groups(3, ("a", "a"), ("b", "z"), ("c", "c")), file)
    assert sorted(asked_in(body) for body in server.bodies) == ["a", "b", "c", "c", "c"]
    assert set(first) < set(more)
    assert len(more) == 9
    server.bodies.clear()
    assert set(ask(server, groups(3, ("a", "a"), ("b", "z"), ("c", "c")), file)) == set(more)
    assert server.bodies == []


@pytest.mark.parametrize("change", ["picture", "expected", "model", "setting"])
def test_another_question_is_asked_though_it_looks_alike(server: Server, tmp_path: Path, change: str) -> None:
    (before,) = ask(server, groups(1, ("a", "1")), tmp_path / "a")
    planned = groups(
        1, ("a", "2" if change == "expected" else "1"), settings=ROUTER[:1] if change == "setting" else (evaluate.SERVERS,)
    )
    if change == "picture":
        planned = [Group("router", 0, planned[0].asked, (replace(PICTURE, seed=1),))]
    if change == "model":
        line = json.loads((tmp_path / "a").read_text())
        (tmp_path / "a").write_text(json.dumps({**line, "model": "another"}) + "\n")
    server.bodies.clear()
    (after,) = ask(server, planned, tmp_path / "a")
    assert len(server.bodies) == 1
    assert len((tmp_path / "a").read_text().splitlines()) == 2
    assert (before == after) == (change == "model")


@pytest.mark.parametrize("torn", ['{"name": "router/0', '{"name": "ü'.encode()[:-1], b"\x00\x00"])
def test_an_end_that_is_torn_is_cut_away(server: Server, tmp_path: Path, torn: str | bytes) -> None:
    file = tmp_path / "a"
    ask(server, groups(2, ("a", "1")), file)
    whole = file.read_bytes()
    file.write_bytes(whole + (torn.encode() if isinstance(torn, str) else torn))
    server.bodies.clear()
    assert len(ask(server, groups(3, ("a", "1")), file)) == 3
    assert len(server.bodies) == 1
    assert file.read_bytes().startswith(whole)
    assert len([json.loads(line) for line in file.read_bytes().splitlines()]) == 3


# Trouble


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path, status: int) -> None:
    server.failures = [web.Response(status=status, headers={"Retry-After": "0"}), web.Response(status=status)]
    assert len(ask(server, groups(1, ("a", "yes")), tmp_path / "a")) == 1
    assert len(server.bodies) == 3


@pytest.mark.parametrize(("status", "tries"), [(400, 1), (500, 1), (503, 3)])
def test_what_will_not_pass_stops_the_run_and_keeps_the_answers(
    server: Server, tmp_path: Path, status: int, tries: int
) -> None:
    ask(server, groups(1, ("a", "yes")), tmp_path / "a")
    server.bodies.clear()
    server.failures = [web.Response(status=status, text="no such thing") for _ in range(9)]
    with pytest.raises(Failed, match=f"{status}: no such thing"):
        ask(server, groups(2, ("a", "yes")), tmp_path / "a")
    assert len(server.bodies) == tries
    assert len((tmp_path / "a").read_text().splitlines()) == 1


def test_a_server_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(evaluate, "PAUSES", ())
    assert evaluate.main(["--url", "http://127.0.0.1:9", "--out", str(tmp_path)]) == 1
    assert "http://127.0.0.1:9/v1/models" in capfd.readouterr().err


def test_a_server_that_passes_over_vir_is_found_out(server: Server, tmp_path: Path) -> None:
    server.heeds = False
    with pytest.raises(Failed, match="does not heed"):
        ask(server, groups(1, ("a", "yes"), settings=ROUTER), tmp_path / "a")
    assert (tmp_path / "a").read_text().count('"setting": "off"') == 1


# All of it


def arguments(server: Server, folder: Path, *more: str) -> list[str]:
    sizes = ["--n", "2", "--talk", "3", "--pictures", "1"]
    return ["--url", server.url + "/", "--out", str(folder / "out"), "--images", str(folder / "images"), *sizes, *more]


def test_results_and_figures_are_written(server: Server, tmp_path: Path, capfd: Any) -> None:
    assert evaluate.main(arguments(server, tmp_path)) == 0
    found = {name: json.loads((tmp_path / f"out/{name}.json").read_text()) for name in ("accuracy", "router", "curve")}
    for result in found.values():
        assert result["server"] == {"model": "tiny", "version": "9.9", "engine": "8.8"}
        assert len(result["date"]) == 10
    for name, style in found["accuracy"]["styles"].items():
        assert list(style) == ["all", *TASKS], name
        assert all(style[task]["n"] == 2 for task in TASKS)
        assert style["number"]["right"] == 0
        assert style["all"]["right"] == style["presence"]["right"] + style["same"]["right"]
    assert found["accuracy"]["text"]["all"]["n"] == 3
    assert [one["setting"] for one in found["router"]["settings"]] == ["off", "auto", "all"]
    assert found["curve"]["settings"][:3] == found["router"]["settings"]
    shares = [one["kept"] for one in found["curve"]["settings"][3:9]]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]
    assert {file.name for file in (tmp_path / "images").iterdir()} == {"accuracy.png", "curve.png"}
    shown = capfd.readouterr()
    assert "| number | 0.0 (0.0 to 65.8) |" in shown.out
    assert "| off | 100.0 |" in shown.out
    assert "curve" in shown.err
    asked = len(server.bodies)
    assert evaluate.main(arguments(server, tmp_path)) == 0
    assert len(server.bodies) == asked


def test_parts_may_be_chosen(server: Server, tmp_path: Path) -> None:
    assert evaluate.main(arguments(server, tmp_path, "--parts", "router")) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"answers.jsonl", "router.json"}
    assert {body["vir"]["mode"] for body in server.bodies} == {"off", "auto", "all"}


def test_an_interrupt_keeps_what_was_answered_and_the_next_run_goes_on(server: Server, tmp_path: Path, capfd: Any) -> None:
    def interrupt() -> None:
        if len(server.bodies) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    server.before = interrupt
    command = arguments(server, tmp_path, "--parts", "router", "--in-flight", "1")
    try:
        assert evaluate.main(command) == 130
    except KeyboardInterrupt:  # would end the tests
        pytest.fail("the interrupt got through")
    assert "goes on from here" in capfd.readouterr().err
    kept = (tmp_path / "out/answers.jsonl").read_text().splitlines()
    assert 4 <= len(kept) <= 5
    assert not (tmp_path / "out/router.json").exists()
    server.before = lambda: None
    server.bodies.clear()
    assert evaluate.main(command) == 0
    total = sum(len(group.items) for group in evaluate.plan_router(1, ROUTER))
    assert len(server.bodies) == total - len(kept)


@pytest.mark.parametrize("bad", [["--n", "0"], ["--n", "-3"], ["--in-flight", "x"], ["--parts", "none"], ["--pictures", "²"]])
def test_options_that_cannot_be_are_refused(bad: list[str], capfd: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(bad)
    assert bad[0] in capfd.readouterr().err


# Figures of results


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605), (450, 500, 0.8706, 0.9233), (0, 0, 0.0, 1.0), (1, 1, 0.2065, 1.0),
    ],
)  # fmt: skip
def test_wilson(right: int, n: int, low: float, high: float) -> None:
    """Among them the examples of Newcombe (1998)."""
    assert evaluate.wilson(right, n) == pytest.approx((low, high), abs=6e-5)


def record(index: int, task: str, answer: str, tokens: int = 0) -> Record:
    return Record(f"{index}/{task}", "m", "router", index, "auto", task, "q", "yes", answer, tokens, 1000)


def test_a_picture_counts_once_however_often_it_was_asked_about() -> None:
    records = [record(0, task, "yes", 1000) for task in ("colour", "count", "number")] + [record(1, "count", "no", 250)]
    assert evaluate.kept(records) == {"pictures": 2, "tokens": 1250, "full": 2000, "kept": 0.625}
    scores = evaluate.by_task(records)
    assert [(task, score["right"], score["n"]) for task, score in scores.items()] == [
        ("all", 3, 4), ("colour", 1, 1), ("count", 1, 2), ("number", 1, 1),
    ]  # fmt: skip


def test_a_table_is_markdown() -> None:
    assert evaluate.table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"
    assert evaluate.percent(evaluate.scored([record(0, "x", "yes"), record(1, "x", "no")])) == "50.0 (9.4 to 90.5)"
    assert evaluate.percent(None) == evaluate.percent(evaluate.scored([])) == "–"


def test_progress_says_how_much_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    progress = evaluate.Progress("part", 8, [record(0, "x", "yes"), record(1, "x", "no")], stream)
    progress.step(True)
    progress.step(True)
    assert stream.getvalue() == "part 3/8  50 s left  66.7% right\n"
    assert [evaluate.timed(seconds) for seconds in (5, 99, 600)] == ["5 s", "99 s", "10 min"]


def test_windows_count_what_a_group_would_have_without_a_router() -> None:
    assert Group("router", 0, (), (PICTURE,)).full == 256 * TILES
    assert Group("trained pairs", 0, (), (PICTURE, PICTURE)).full == 512 * TILES
    assert Group("text", 0, ()).full == 0
    assert len(scenes.windows(PICTURE, Style())) == TILES
