import base64

from demo.evaluation.plan import (
    ROUTER_MODES,
    SEED,
    STREAMS,
    STYLES,
    THRESHOLDS,
    QuestionGroup,
    image_data_urls,
    make_generator,
    plan_accuracy,
    plan_router,
)
from demo.scenes.labels import tile_windows
from demo.scenes.style import Style
from demo.text.questions import TASKS
from tests.demo.evaluation.fake_gateway import SCENE, SCENE_TILES
from tests.vision_worker.images import cut_file


def test_each_task_has_the_requested_number_of_questions() -> None:
    groups = list(plan_accuracy(7, 12))
    for name, style in STYLES.items():
        own = [group for group in groups if group.stream in (name, f"{name} pairs")]
        tasks = [question.task for group in own for question in group.questions]
        assert {task: tasks.count(task) for task in TASKS} == dict.fromkeys(TASKS, 7)
        assert all(group.style == style for group in own)
        assert {scene.texture for group in own for scene in group.scenes} <= set(style.textures)
    names = [request.name for group in groups for request in group.requests]
    assert len(set(names)) == len(names)


def test_pairs_are_equal_or_differ() -> None:
    groups = list(plan_accuracy(7, 12))
    pairs = [group for group in groups if group.stream.endswith("pairs")]
    assert all(len(group.scenes) == 2 for group in pairs)
    assert all(group.scenes[0].seed != group.scenes[1].seed for group in pairs if group.questions[0].answer == "no")
    assert all((group.scenes[0] == group.scenes[1]) == (group.questions[0].answer == "yes") for group in pairs)
    near_pairs = [group for group in groups if group.stream.endswith("near")]
    assert [group.questions[0].answer for group in near_pairs] == ["no", "no"]
    assert all(first.seed == second.seed for first, second in (group.scenes for group in near_pairs))


def test_a_third_of_the_text_questions_are_about_a_missing_image() -> None:
    questions = [question for group in plan_accuracy(1, 12) if group.stream == "text" for question in group.questions]
    assert len({question.text for question in questions}) == 12
    assert [question.task for question in questions].count("no image") == 4


def test_a_plan_is_the_start_of_a_longer_plan() -> None:
    def pairs(n: int) -> list[QuestionGroup]:
        return [group for group in plan_accuracy(n, 1) if group.stream == "trained pairs"]

    assert pairs(4) == pairs(6)[:4]
    assert list(plan_router(3, ROUTER_MODES)) == list(plan_router(5, ROUTER_MODES))[:3]


def test_router_images_have_several_tiles_and_mostly_numbers() -> None:
    groups = list(plan_router(30, THRESHOLDS))
    assert all(group.uncompressed_tokens > 256 for group in groups)
    with_number = [any(question.task == "number" for question in group.questions) for group in groups]
    assert all(with_number[i] for i in range(30) if i % 5)
    assert all(len(group.requests) == len(THRESHOLDS) * len(group.questions) for group in groups)
    assert len({repr(group.scenes) for group in groups}) == 30


def test_streams_have_different_seeds_far_from_those_of_training() -> None:
    values = {tuple(make_generator(stream, i).integers(2**31, size=4)) for stream in STREAMS for i in range(3)}
    assert len(values) == 3 * len(STREAMS)
    assert SEED > 2**30


def test_equal_scenes_become_equal_files() -> None:
    for index in range(6):  # PNG and JPEG
        first, second = image_data_urls(QuestionGroup("trained pairs", index, (), (SCENE, SCENE)))
        assert first == second
        data = base64.b64decode(first.split(",")[1])
        assert len(cut_file(data, Style().tiling)) == SCENE_TILES
        assert first.startswith("data:image/png") == data.startswith(b"\x89PNG")


def test_uncompressed_tokens_include_thumbnails() -> None:
    assert QuestionGroup("router", 0, (), (SCENE,)).uncompressed_tokens == 256 * SCENE_TILES
    assert QuestionGroup("trained pairs", 0, (), (SCENE, SCENE)).uncompressed_tokens == 512 * SCENE_TILES
    assert QuestionGroup("text", 0, ()).uncompressed_tokens == 0
    assert len(tile_windows(SCENE, Style())) == SCENE_TILES
