"""The page of demos/teach: its server's routes, what it refuses and what it forgets, and the page in a real browser."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import gc
import json
import re
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from demos.teach import app, pictures, teacher
from demos.teach.pictures import Ready, ready_folder
from demos.teach.serving import in_background
from demos.teach.teacher import Teacher
from edge_dfcil import Learner
from edge_dfcil.demo import Batches
from edge_dfcil.privacy.account import account
from exporters import OnnxClassifier
from tests.conftest import QUICK, quick_learner

HERE = "http://127.0.0.1:8765"
RECIPE = QUICK.changed({"refine.head": "lda", "schedule.adapt": "first"})
# Long enough to be cancelled on any machine; no test waits for its end.
ENDLESS = RECIPE.changed({"schedule.min_steps": 1_000_000, "generator.steps": 1_000_000})
STYLE = (Path(app.HERE) / "static" / "style.css").read_text()


def png(image: Any) -> bytes:
    """A uint8 image (3, H, W) as a PNG file."""
    file = BytesIO()
    Image.fromarray(np.asarray(image).transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


def some_pictures(n: int = 12, side: int = 24, seed: int = 0) -> list[bytes]:
    generator = np.random.default_rng(seed)
    return [png(generator.integers(0, 255, (3, side, side), np.uint8)) for _ in range(n)]


@pytest.fixture(scope="session")
def ready(train: Batches, test: Batches) -> Ready:
    """Digits from 0 to 4, a few of each."""
    names = [str(digit) for digit in range(5)]
    return Ready(
        "digits",
        {name: train.of((name,)).images[:40] for name in names},
        {name: test.of((name,)).images[:10] for name in names},
    )


@pytest.fixture(scope="module")
def _one_task(ready: Ready) -> Learner:
    learner, images = quick_learner(recipe=RECIPE, precision="float32"), [ready.train[name] for name in ("0", "1")]
    batches = [(one, torch.full((len(one),), place)) for place, one in enumerate(images)]
    learner.learn_task(batches, ["0", "1"], progress=False)
    return learner


@pytest.fixture
def lesson(_one_task: Learner, ready: Ready) -> Iterator[Teacher]:
    """The teacher of a learner that knows 0 and 1, with their class statistics; each test has its own."""
    found = Teacher(copy.deepcopy(_one_task), ready)
    yield found
    found.close()
    wait(found)


@pytest.fixture
def client(lesson: Teacher) -> TestClient:
    return TestClient(app.create_app(lesson), base_url=HERE, headers={"Origin": HERE})


def wait_until(holds: Callable[[], object], seconds: float = 300) -> None:
    """Waits for another thread or the page; the limit only ends a test that hangs."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "the condition was not met in time"
        time.sleep(0.05)


def wait(lesson: Teacher) -> dict[str, Any]:
    """Waits until no job runs, and returns the state."""
    wait_until(lambda: lesson.state()["job"] is None)
    return lesson.state()


def collect(client: TestClient, name: str, contents: list[bytes]) -> None:
    for content in contents:
        assert client.post("/api/pictures", params={"class": name}, content=content).status_code == 200


# Which requests are allowed


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8765", ""])
@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/api/state"), ("POST", "/api/cancel")])
def test_another_host_name_is_refused(client: TestClient, method: str, path: str, host: str) -> None:
    assert client.request(method, path, headers={"Host": host, "Origin": f"http://{host}"}).status_code == 400


@pytest.mark.parametrize("origin", [None, "null", "http://evil.example", "http://127.0.0.1:9999", "https://127.0.0.1:8765"])
def test_a_change_must_come_from_this_page(lesson: Teacher, origin: str | None) -> None:
    client = TestClient(app.create_app(lesson), base_url=HERE, headers={} if origin is None else {"Origin": origin})
    answer = client.post("/api/forget", json={"name": "0"})
    assert answer.status_code == 403 and HERE in answer.json()["error"]
    assert lesson.learner.classes == ("0", "1")


def test_every_route_that_changes_something_is_checked(lesson: Teacher) -> None:
    found = app.create_app(lesson)
    posts: list[Any] = [route for route in found.routes if "POST" in (getattr(route, "methods", None) or ())]
    client = TestClient(found, base_url=HERE)
    assert len(posts) > 5
    assert {client.post(route.path).status_code for route in posts} == {403}
    assert not any("GET" in route.methods for route in posts)


@pytest.mark.parametrize(("path", "status"), [("/", 200), ("/static/main.js", 200), ("/api/state", 200), ("/nowhere", 404)])
def test_everything_is_forbidden_but_this_server(client: TestClient, path: str, status: int) -> None:
    answer = client.get(path)
    assert answer.status_code == status
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "'unsafe" not in policy and "http" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff" and answer.headers["Cache-Control"] == "no-store"
    assert client.get("/", headers={"Host": "evil.example"}).headers["Content-Security-Policy"] == policy


def test_only_the_runtime_is_served(lesson: Teacher, tmp_path: Path) -> None:
    for name in (*app.RUNTIME_FILES, "other.mjs"):
        (tmp_path / name).write_text("")
    client = TestClient(app.create_app(lesson, tmp_path), base_url=HERE)
    assert client.get("/api/state").json()["runtime"]
    assert client.get(f"/runtime/{app.RUNTIME_FILES[0]}").status_code == 200
    for other in ("other.mjs", "..%2Fapp.py", "%2Fetc%2Fpasswd"):
        assert client.get(f"/runtime/{other}").status_code == 404
    assert client.get("/static/../app.py").status_code == 404


def test_without_the_runtime_the_page_knows_it(lesson: Teacher, tmp_path: Path) -> None:
    client = TestClient(app.create_app(lesson, tmp_path), base_url=HERE)
    assert client.get("/api/state").json()["runtime"] is False


# Pictures


def test_a_picture_with_too_many_bytes_is_refused(client: TestClient, lesson: Teacher) -> None:
    content = bytes(pictures.MAX_BYTES + 1)
    assert client.post("/api/pictures?class=mug", content=content).status_code == 413
    parts = (content[i : i + 2**20] for i in range(0, len(content), 2**20))  # without a Content-Length
    answer = client.post("/api/predict", content=parts)
    assert answer.status_code == 413 and f"{pictures.MAX_BYTES:,}" in answer.json()["error"]
    assert lesson.state()["draft"] == []


def test_a_picture_with_too_many_pixels_is_refused(client: TestClient) -> None:
    for side in (6000, 14_000):  # above Pillow's own limit, too
        file = BytesIO()
        Image.new("1", (side, side)).save(file, "PNG")
        answer = client.post("/api/pictures?class=mug", content=file.getvalue())
        assert answer.status_code == 400 and f"{pictures.MAX_PIXELS:,}" in answer.json()["error"]


@pytest.mark.parametrize("content", [b"", b"GIF", b"<svg/>", some_pictures(1)[0][:90]])
def test_what_is_no_picture_is_refused(client: TestClient, lesson: Teacher, content: bytes) -> None:
    for path in ("/api/pictures?class=mug", "/api/predict"):
        answer = client.post(path, content=content)
        assert answer.status_code == 400 and "send a whole JPEG" in answer.json()["error"]
    assert lesson.state()["draft"] == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "cannot name"),
        (" ", "cannot name"),
        ("x" * 61, "cannot name"),
        ("a\0b", "cannot name"),
        ("0", "known"),
        ("3", "ready"),
    ],
)
def test_a_class_needs_a_name_of_its_own(client: TestClient, name: str, said: str) -> None:
    answer = client.post("/api/pictures", params={"class": name}, content=some_pictures(1)[0])
    assert answer.status_code == 400 and said in answer.json()["error"]


def test_a_task_takes_so_many_pictures_and_classes(client: TestClient, lesson: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "MAX_PICTURES", 3)
    monkeypatch.setattr(teacher, "MAX_CLASSES", 2)
    content = some_pictures(1)[0]
    collect(client, "mug", [content])
    collect(client, "cup", [content])
    assert "2 classes" in client.post("/api/pictures?class=jug", content=content).json()["error"]
    collect(client, "cup", [content])
    assert "3 pictures" in client.post("/api/pictures?class=cup", content=content).json()["error"]
    assert lesson.state()["draft"] == [{"name": "mug", "count": 1}, {"name": "cup", "count": 2}]
    assert lesson.state()["held"]["task"] == {"pictures": 3, "bytes": 3 * 3 * 16 * 16}


def test_a_collected_class_can_be_discarded(client: TestClient, lesson: Teacher) -> None:
    collect(client, "mug", some_pictures(2))
    assert client.post("/api/discard", json={"name": "mug"}).status_code == 200
    assert lesson.state()["draft"] == []
    assert "no pictures" in client.post("/api/discard", json={"name": "mug"}).json()["error"]


@pytest.mark.parametrize("body", [b"no JSON", b"[]", b'{"name": 1}', b"\xff"])
def test_a_request_that_is_not_of_the_page_is_refused(client: TestClient, body: bytes) -> None:
    assert client.post("/api/forget", content=body).status_code == 400


# Teaching


def test_own_pictures_are_taught_and_nothing_of_them_is_held(client: TestClient, lesson: Teacher) -> None:
    held = []
    add = pictures.square

    def watched(content: bytes, size: int) -> torch.Tensor:
        image = add(content, size)
        held.append(weakref.ref(image))
        return image

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "square", watched)
        collect(client, "mug", some_pictures(12, seed=1))
        collect(client, "cup", some_pictures(12, seed=2))
    assert client.post("/api/teach", json={}).status_code == 202
    state = wait(lesson)
    assert state["outcome"]["kind"] == "done" and "instant after" in state["outcome"]["text"]
    assert lesson.learner.tasks == (("0", "1"), ("mug", "cup"))
    gc.collect()
    assert len(held) == 24 and not any(one() is not None for one in held)
    assert state["draft"] == [] and state["held"]["task"] == {"pictures": 0, "bytes": 0}
    assert not list(lesson.onnx_path.parent.iterdir()), "nothing was written"
    assert state["history"] == [] and client.post("/api/sample").status_code == 400, "no picture was held out for measuring"


def test_ready_classes_are_taught_and_measured(client: TestClient, lesson: Teacher, ready: Ready) -> None:
    assert client.post("/api/teach", json={"ready": ["2", "3"]}).status_code == 202
    state = wait(lesson)
    assert state["tasks"] == (("0", "1"), ("2", "3"))
    assert [one["name"] for one in state["ready"]["classes"]] == ["4"]
    (entry,) = state["history"]
    assert entry["label"] == "instant" and {name: n for name, (_, n) in entry["right"].items()} == {"2": 10, "3": 10}
    found = lesson.learner.evaluate([(ready.test["2"], ["2"] * 10)])
    assert entry["right"]["2"][0] == round(10 * found.accuracy)
    sample = client.post("/api/sample").json()
    pixels = torch.from_numpy(np.array(Image.open(BytesIO(base64.b64decode(sample["png"]))))).permute(2, 0, 1)
    assert any(torch.equal(pixels, image) for image in ready.test[sample["name"]]), "one that was held out"


def test_a_cancelled_task_leaves_the_model_and_no_picture(client: TestClient, lesson: Teacher) -> None:
    lesson.learner = quick_learner(recipe=ENDLESS, precision="float32")
    collect(client, "mug", some_pictures(12))
    client.post("/api/teach", json={"ready": ["2"]})
    wait_until(lambda: (lesson.state()["job"] or {}).get("step"))
    assert lesson.state()["job"]["kind"] == "teach" and lesson.state()["job"]["names"] == ("mug", "2")
    client.post("/api/cancel")
    state = wait(lesson)
    assert state["outcome"]["kind"] == "cancelled" and "last commit" in state["outcome"]["text"]
    assert state["classes"] == () and state["draft"] == []


@pytest.mark.slow
def test_it_answers_while_the_network_adapts_and_keeps_that_when_cancelled(client: TestClient, lesson: Teacher) -> None:
    client.post("/api/teach", json={"ready": ["2", "3"]})
    wait(lesson)
    lesson.learner.recipe = ENDLESS
    client.post("/api/teach", json={"ready": ["4"], "adapt": True})
    wait_until(lambda: "instant" in (lesson.state()["job"] or {"commits": ["instant"]})["commits"])
    assert "4" in client.post("/api/predict", content=some_pictures(1)[0]).json()["classes"]
    busy = client.post("/api/teach", json={"ready": ["4"]})
    assert busy.status_code == 409 and "wait for it, or cancel it" in busy.json()["error"]
    for path, values in (("forget", {"name": "2"}), ("dream", {"per_class": 1}), ("export", {})):
        assert client.post(f"/api/{path}", json=values).status_code == 409
    client.post("/api/cancel")
    state = wait(lesson)
    assert state["outcome"]["kind"] == "cancelled" and state["classes"] == ("0", "1", "2", "3", "4")


def test_what_cannot_be_learnt_is_said_and_its_pictures_stay(client: TestClient, lesson: Teacher) -> None:
    collect(client, "mug", some_pictures(1))
    client.post("/api/teach", json={})
    state = wait(lesson)
    assert state["outcome"]["kind"] == "error" and "image" in state["outcome"]["text"]
    assert state["draft"] == [{"name": "mug", "count": 1}] and state["classes"] == ("0", "1")


def test_a_task_needs_classes_that_are_there(client: TestClient) -> None:
    assert "no class to teach" in client.post("/api/teach", json={}).json()["error"]
    assert "no pictures of '7'" in client.post("/api/teach", json={"ready": ["7"]}).json()["error"]
    assert client.post("/api/teach", json={"ready": "2"}).status_code == 400


def test_a_failure_of_the_server_itself_ends_the_task(
    client: TestClient, lesson: Teacher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def run(self) -> None:
            raise RuntimeError("a bug")

        def cancel(self) -> None:
            """Does nothing: it has ended."""

    monkeypatch.setattr(lesson.learner, "session", lambda *args, **settings: Broken())
    client.post("/api/teach", json={"ready": ["2"]})
    state = wait(lesson)
    assert state["outcome"]["kind"] == "error" and "a bug" not in state["outcome"]["text"]
    assert "a bug" in caplog.text and state["classes"] == ("0", "1")


# Using and changing the model


def test_the_answer_is_the_learner_s(client: TestClient, lesson: Teacher, ready: Ready) -> None:
    image = ready.test["1"][0]
    answer = client.post("/api/predict", content=png(image)).json()
    assert answer["classes"] == ["0", "1"] and answer["version"] == lesson.state()["version"]
    assert answer["probabilities"] == pytest.approx(lesson.learner.probabilities(image)[0].tolist(), abs=1e-6)


def test_before_the_first_task_there_is_no_answer(ready: Ready) -> None:
    with contextlib.closing(Teacher(quick_learner(), ready)) as lesson:
        client = TestClient(app.create_app(lesson), base_url=HERE, headers={"Origin": HERE})
        for path, content in (("predict", some_pictures(1)[0]), ("dream", b"{}"), ("export", b"")):
            answer = client.post(f"/api/{path}", content=content)
            assert answer.status_code == 400 and "nothing has been learnt yet" in answer.json()["error"]


@pytest.mark.slow
def test_a_class_is_renamed_and_forgotten(client: TestClient, lesson: Teacher) -> None:
    client.post("/api/teach", json={"ready": ["2", "3"]})
    before = wait(lesson)
    assert client.post("/api/rename", json={"name": "2", "to": " two "}).status_code == 200
    state = lesson.state()
    assert state["classes"] == ("0", "1", "two", "3") and state["version"] == before["version"] + 1
    assert state["history"][0]["right"]["two"] == before["history"][0]["right"]["2"]
    assert client.post("/api/forget", json={"name": "two"}).status_code == 200
    state = lesson.state()
    assert state["classes"] == ("0", "1", "3") and set(state["history"][-1]["right"]) == {"3"}
    for path, values in (
        ("forget", {"name": "two"}),
        ("rename", {"name": "two", "to": "2"}),
        ("rename", {"name": "3", "to": "0"}),
    ):
        answer = client.post(f"/api/{path}", json=values)
        assert answer.status_code == 400 and answer.json()["error"]
    assert lesson.learner.classes == ("0", "1", "3")


def test_every_byte_of_the_model_is_listed(client: TestClient, lesson: Teacher) -> None:
    kept, model = lesson.state()["kept"], lesson.learner.model
    expected = account(model.tensors(), model.settings())
    assert kept["bytes"] == sum(role["bytes"] for role in kept["roles"]) == sum(one.bytes for one in expected)
    assert {role["role"] for role in kept["roles"]} == {one.kind.replace("_", " ") for one in expected}
    listed = client.get("/api/kept").json()
    assert [one["name"] for one in listed] == [one.name for one in expected]
    assert kept["bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in model.tensors().values())


def test_dreams_are_answered_and_not_held(client: TestClient, lesson: Teacher) -> None:
    answer = client.post("/api/dream", json={"per_class": 2}).json()
    assert answer["size"] == 16 and [one["name"] for one in answer["dreams"]] == ["0", "1"]
    images = [image for one in answer["dreams"] for image in one["images"]]
    assert images and all(len(base64.b64decode(image)) == 3 * 16 * 16 for image in images)
    assert all(len(one["images"]) <= 2 for one in answer["dreams"]) and lesson.learner.classes == ("0", "1")
    gc.collect()
    shape = (4 * 2 * 2, 3, 16, 16)
    assert not any(type(one) is torch.Tensor and one.shape == shape for one in gc.get_objects())
    for wrong in (0, 13, "2", True):
        assert client.post("/api/dream", json={"per_class": wrong}).status_code == 400


def test_dreaming_can_be_cancelled(client: TestClient, lesson: Teacher) -> None:
    lesson.learner.recipe = ENDLESS
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        answer = loop.run_in_executor(None, lambda: client.post("/api/dream", json={"per_class": 1}))
        wait_until(lambda: (lesson.state()["job"] or {}).get("step"))
        client.post("/api/cancel")
        assert "cancelled" in loop.run_until_complete(answer).json()["error"]
        loop.run_until_complete(loop.shutdown_default_executor())


@pytest.mark.slow
def test_the_exported_file_answers_as_the_server(client: TestClient, lesson: Teacher, tmp_path: Path) -> None:
    assert client.get("/api/model.onnx").status_code == 409
    version = client.post("/api/export").json()["version"]
    content = client.get("/api/model.onnx").content
    (tmp_path / "model.onnx").write_bytes(content)
    picture = some_pictures(1, side=50)[0]
    answer = client.post("/api/predict", content=picture).json()
    found = OnnxClassifier(tmp_path / "model.onnx").probabilities(np.asarray(Image.open(BytesIO(picture))))[0]
    assert answer["version"] == version and answer["probabilities"] == pytest.approx(found.tolist(), abs=1e-3)
    client.post("/api/forget", json={"name": "0"})
    assert client.get("/api/model.onnx").status_code == 409, "a file of the earlier model is not served"


def test_the_model_file_can_be_loaded(client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(client.get("/api/model.safetensors").content)
    assert Learner.load(tmp_path / "model.safetensors").classes == ("0", "1")


def test_whoever_listens_gets_the_state_now_and_after_each_change(lesson: Teacher) -> None:
    async def two() -> list[dict[str, Any]]:
        messages = lesson.feed.listen()
        first = await anext(messages)
        await asyncio.to_thread(lesson.add_picture, "mug", some_pictures(1)[0])
        second = await anext(messages)
        await messages.aclose()  # type: ignore[attr-defined]
        return [json.loads(message.removeprefix("data: ")) for message in (first, second)]

    first, second = asyncio.run(two())
    assert first["draft"] == [] and second["draft"] == [{"name": "mug", "count": 1}]


def test_of_a_folder_every_fifth_picture_is_held_back(tmp_path: Path) -> None:
    for name, n in (("cat", 11), ("dog", 3)):
        (tmp_path / name).mkdir()
        for number, content in enumerate(some_pictures(n, seed=n)):
            (tmp_path / name / f"{number:02}.png").write_bytes(content)
    found = ready_folder(tmp_path, 16)
    assert {name: len(images) for name, images in found.train.items()} == {"cat": 9, "dog": 3}
    assert {name: len(images) for name, images in found.test.items()} == {"cat": 2}
    assert not any(torch.equal(image, held) for image in found.train["cat"] for held in found.test["cat"])


# The page


def contrast(one: str, other: str) -> float:
    """The contrast ratio (WCAG 2.2) of two colours "#rrggbb"."""

    def luminance(colour: str) -> float:
        levels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_contrast(scheme: int) -> None:
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", STYLE.split(":root {")[scheme + 1].split("}")[0]))
    pairs = [(text, ground) for text in ("ink", "soft", "accent", "danger") for ground in ("card", "page")]
    pairs += [("on-accent", "accent"), ("accent", "tint"), ("ink", "tint"), ("second", "card")]
    low = {pair: contrast(*(colours[name] for name in pair)) for pair in pairs}
    assert min(low.values()) >= 4.5, low
    assert contrast(colours["field"], colours["card"]) >= 3


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    for path in (Path(app.HERE) / "static").iterdir():
        found = set(re.findall(r"https?://[^\"'` )]*", path.read_text()))
        assert found <= {"http://www.w3.org/2000/svg"}, path  # the name of a format, not an address


CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or not (app.RUNTIME / app.RUNTIME_FILES[0]).is_file(),
    reason="needs Chromium (apt-get install chromium) and onnxruntime-web (npm install --prefix demos/teach)",
)


@pytest.fixture
def page(ready: Ready) -> Iterator[Any]:
    """The page of a learner that has learnt nothing, in a browser with a fake camera; `page.lesson` is its teacher."""
    sync_api = pytest.importorskip("playwright.sync_api")
    lesson = Teacher(quick_learner(recipe=ENDLESS, precision="float32"), ready)
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    # Playwright keeps an event loop running in this thread, so nothing here may await.
    with in_background(lesson) as url, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=camera)
        found = browser.new_page(viewport={"width": 360, "height": 800})
        found.set_default_timeout(300_000)
        found.lesson, found.asked, found.complaints = lesson, [], []
        found.on("request", lambda request: found.asked.append(request.url))
        found.on("websocket", lambda socket: found.asked.append(socket.url))
        found.on("requestfailed", lambda request: found.complaints.append(request.url))
        found.on("pageerror", lambda error: found.complaints.append(str(error)))
        found.on("console", lambda said: found.complaints.append(said.text) if said.type == "error" else None)
        found.goto(url)
        found.wait_for_selector("body[data-ready]")
        yield found
        browser.close()


def press(page: Any, selector: str) -> None:
    """Presses a button with the keyboard only."""
    page.wait_for_selector(f"{selector}:enabled")
    page.focus(selector)
    page.keyboard.press("Enter")


def drop(page: Any, selector: str, content: bytes) -> None:
    """Drops a picture file on a part of the page."""
    script = """(base64) => {
      const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
      const transfer = new DataTransfer();
      transfer.items.add(new File([bytes], "picture.png", { type: "image/png" }));
      return transfer;
    }"""
    transfer = page.evaluate_handle(script, base64.b64encode(content).decode())
    page.dispatch_event(selector, "drop", {"dataTransfer": transfer})


def outcome(page: Any, kind: str) -> str:
    page.wait_for_selector(f"#outcome.{kind}")
    return str(page.inner_text("#outcome"))


def known(page: Any) -> list[str]:
    return [chip.inner_text() for chip in page.query_selector_all("#known button")]


def comparison(page: Any, asked: list[float]) -> Any:
    """The probabilities that the page compares, `server` and `browser`, once the server's equal `asked`."""
    found: list[Any] = []

    def is_there() -> bool:
        found[:] = [json.loads(page.get_attribute("#answer", "data-compared") or '{"server": []}')]
        return len(found[0]["server"]) == len(asked) and np.allclose(found[0]["server"], asked, atol=1e-6)

    wait_until(is_there)
    return found[0]


@needs_browser
@pytest.mark.slow
def test_a_visitor_teaches_cancels_forgets_and_predicts(page: Any, ready: Ready, tmp_path: Path) -> None:
    lesson = page.lesson

    # A task is cancelled in the middle.
    press(page, "#teach-button")
    page.wait_for_selector("[role=progressbar][aria-valuenow]")
    press(page, "#cancel-button")
    assert "last commit" in outcome(page, "cancelled") and known(page) == []

    # Two classes, then one of the visitor's own: from the camera and from files.
    lesson.learner.recipe = RECIPE
    press(page, "#teach-button")
    assert "Learnt 0, 1" in outcome(page, "done") and known(page) == ["0", "1"]
    page.click("#ready-classes button >> nth=0")
    page.click("#ready-classes button >> nth=1")
    page.fill("#class-name", "mug <b>")
    press(page, "#teach-camera")
    page.wait_for_selector("#camera-dialog[open]")
    page.click("#camera-many")
    page.wait_for_selector("text=20 pictures taken")
    page.click("#camera-close")
    files = [tmp_path / f"{number}.png" for number in range(4)]
    for path, content in zip(files, some_pictures(4), strict=True):
        path.write_bytes(content)
    (tmp_path / "bad.png").write_text("no picture")
    page.set_input_files("#teach-input", [*files, tmp_path / "bad.png"])
    page.wait_for_selector("text=bad.png: this is not a picture")
    assert "24 pictures" in page.inner_text("#draft")
    press(page, "#teach-button")
    page.wait_for_selector("#known .task:nth-child(2)")
    outcome(page, "done")
    assert known(page) == ["0", "1", "mug <b>"], "the name is shown literally"
    assert page.inner_text("#held-table tr:first-child td") == "0"

    # A task that adapts answers after its instant commit, and is then cancelled.
    lesson.learner.recipe = ENDLESS
    page.check("input[value=adapt]")
    page.wait_for_selector("#teach-button:has-text('Teach 2 and 3')")
    press(page, "#teach-button")
    page.wait_for_selector("#stages .commit")
    assert known(page) == ["0", "1", "mug <b>", "2", "3"]
    press(page, "#cancel-button")
    outcome(page, "cancelled")
    lesson.learner.recipe = RECIPE

    # The server and the browser answer alike for pictures of any size.
    for content in (png(ready.test["2"][0]), some_pictures(1, side=61)[0], some_pictures(1, side=300)[0]):
        asked = lesson.learner.probabilities(pictures.decode(content))[0].tolist()
        drop(page, "#try-drop", content)
        answers = comparison(page, asked)
        assert np.abs(np.subtract(answers["browser"], answers["server"])).max() <= 1e-3
    page.select_option("#truth", "2")
    assert "right of 1 picture" in page.inner_text("#tally")

    # One class is forgotten, and both answer without it.
    page.click("text=mug <b>")
    press(page, "#forget-button")
    page.wait_for_selector("#class-dialog", state="hidden")
    wait_until(lambda: known(page) == ["0", "1", "2", "3"])
    assert list(lesson.learner.classes) == ["0", "1", "2", "3"]
    answers = comparison(page, lesson.learner.probabilities(pictures.decode(content))[0].tolist())
    assert np.abs(np.subtract(answers["browser"], answers["server"])).max() <= 1e-3

    # Dreams, and what is kept.
    press(page, "#dream-button")
    page.wait_for_selector("#dreams canvas")
    assert f"{lesson.state()['kept']['bytes']:,} bytes" in page.inner_text("#kept-total")
    page.click("summary")
    page.wait_for_selector("#tensors td")
    assert page.locator("#tensors tr").count() == len(lesson.learner.model.tensors())

    assert page.evaluate("document.documentElement.scrollWidth") <= 360, "nothing is wider than a phone"
    unlabelled = "[...document.querySelectorAll('input:not([type=file]), select')].filter((one) => !one.labels.length).length"
    assert page.evaluate(unlabelled) == 0
    assert {urlsplit(url).netloc for url in page.asked} == {urlsplit(page.url).netloc}, "no request leaves the host"
    refused = [one for one in page.complaints if "400" not in one and "bad.png" not in one and "/api/events" not in one]
    assert refused == [], "the policy forbids nothing that the page does"
