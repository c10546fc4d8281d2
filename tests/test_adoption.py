"""Classifiers that were trained elsewhere: taken apart, checked, saved, loaded and exported, or refused with a reason."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from edge_dfcil import BackboneError, ClassError, EdgeDfcilError, Learner, ModelFileError, SettingError, list_backbones
from edge_dfcil.demo import Batches
from edge_dfcil.model import adoption
from exporters import OnnxClassifier
from tests.conftest import NAMES, QUICK

ABC = ["a", "b", "c"]


def block(inputs: int, outputs: int, **settings: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs, **settings), nn.ReLU())


def small(outputs: int = 3, last: nn.Module | None = None) -> nn.Sequential:
    """A classifier for 16 px whose statistics have been learnt."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = [block(3, 8), block(8, 16), last or block(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return learnt(nn.Sequential(*body, nn.Linear(16, outputs)))


def learnt(network: nn.Sequential, size: int = 16) -> nn.Sequential:
    """The network after some passes in train mode, so that BatchNorm has statistics."""
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(8, 3, size, size))
    return network.eval()


def adopted(network: nn.Module, classes: Any = ABC, **settings: Any) -> Learner:
    return Learner.from_classifier(network, classes, **{"image_size": 16, "recipe": QUICK, "device": "cpu", **settings})


def images(n: int, size: int = 16) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def network() -> nn.Sequential:
    return small()


class Named(nn.Module):
    """Returns what `give` makes of the logits."""

    def __init__(self, give: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.network, self.give = small(), give

    def forward(self, x: Tensor) -> object:
        return self.give(self.network(x))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "None was given"),
        ("net.pt", "'net.pt' was given: build the network"),
        (Path("net.pt"), "'net.pt' was given: build the network"),
        (small().state_dict(), "load_state_dict"),
        (nn.Linear, "make an instance"),
        (small, "call it"),
        (torch.jit.script(small()), "TorchScript"),
        (nn.Sequential(nn.LazyConv2d(4, 3), *small()), "has no shape yet"),
        (small().half(), "float16; weights must be torch.float32"),
        (small().to("meta"), "no values"),
        (Named(lambda logits: (logits, logits)), "gives a tuple and not one tensor"),
        (Named(lambda logits: {"logits": logits}), "gives a dict and not one tensor"),
        (Named(lambda logits: logits.softmax(1)), "leave softmax out"),
        (Named(lambda logits: logits / 0), "does not run|not its last linear layer"),
        (Named(lambda logits: logits.squeeze(0)[:1].cpu()), "features of shape"),
        (
            small(last=nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), nn.BatchNorm2d(16, track_running_stats=False))),
            "'2.1' keeps no running",
        ),
    ],
)
def test_what_is_no_classifier_is_refused(given: Any, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        adopted(given)
    with pytest.raises(EdgeDfcilError):
        Learner.load("nowhere", "cpu", backbone=given)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"image_size": (16, 16)}, SettingError, r"\(16, 16\) is a tuple"),
        ({"image_size": 16.0}, SettingError, "16.0 is a float"),
        ({"image_size": "16"}, SettingError, "is a str"),
        ({"image_size": True}, SettingError, "True"),
        ({"image_size": np.int64(4)}, SettingError, "image_size=4;"),
        ({"image_size": 10**12}, SettingError, "to 4096"),
        ({"seed": 10**20}, SettingError, "seed=1"),
        ({"seed": -1}, SettingError, "seed=-1"),
        ({"seed": 0.5}, SettingError, "0.5 is a float"),
        ({"seed": None}, SettingError, "NoneType"),
        ({"mean": 0.5, "std": 0.5}, SettingError, "three numbers each"),
        ({"mean": (0, 0, float("nan")), "std": (1, 1, 1)}, SettingError, "three numbers each"),
        ({"mean": (0.5, 0.5, 0.5)}, SettingError, "give both"),
        ({"head": "fc"}, BackboneError, "not a linear layer"),
        ({"backbone": "resnet8"}, BackboneError, "not those of resnet8"),
        ({"backbone": nn.Identity()}, BackboneError, "must be a string"),
    ],
)
def test_settings_that_cannot_work_are_refused(network: Any, settings: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        adopted(network, **settings)
    assert "np." not in str(raised.value)


@pytest.mark.parametrize(
    "classes", [3, None, "abc", b"abc", {"a", "b", "c"}, {0: "a", 1: "b", 2: "c"}, [], ["a", "b", 3], ["a", "a", "b"]]
)
def test_classes_that_are_no_list_of_names_are_refused(network: Any, classes: Any) -> None:
    with pytest.raises(ClassError):
        adopted(network, classes)


def test_names_and_sizes_of_numpy_are_taken(network: Any) -> None:
    learner = adopted(network, np.array(ABC), image_size=np.int64(16), seed=np.int32(3))
    assert learner.classes == ("a", "b", "c")
    assert (type(learner.image_size), type(learner.seed)) == (int, int)


def test_one_output_is_no_softmax() -> None:
    with pytest.raises(BackboneError, match="one output"):
        adopted(small(1), ["a"])


@pytest.mark.parametrize("key", ["0.0.weight", "1.1.running_mean", "2.1.running_var", "5.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(network: Any, key: str, value: Any) -> None:
    network.state_dict()[key].view(-1)[1] = value
    with pytest.raises(BackboneError, match=f"{key} contains NaN or infinite"):
        adopted(network)


def test_an_answer_that_depends_on_the_batch_is_refused() -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0, keepdim=True)

    with pytest.raises(BackboneError, match="depends on the other images"):
        adopted(small(last=nn.Sequential(block(16, 16), Centred())))


def test_statistics_that_were_never_learnt_are_a_warning(network: Any) -> None:
    fresh = nn.Sequential(block(3, 8), block(8, 8), block(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    with pytest.warns(UserWarning, match="3 of 3 BatchNorm layers.*nothing to invert") as warned:
        adopted(fresh)
    assert warned[0].filename.endswith("test_adoption.py")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adopted(network)
        Learner(fresh[:5], image_size=16, device="cpu")  # a backbone that is to be trained


def test_the_callers_module_stays_in_its_modes(network: Any, train: Batches) -> None:
    """Train mode with one layer frozen, as when fine-tuning; also a dead channel, and a cumulative average."""
    network.train()
    network[1][1].eval()
    network[2][1].momentum = None
    network[0][0].weight.data[0] = 0
    network[0][1].running_var[0] = 0
    before, modes = copy.deepcopy(network.state_dict()), [module.training for module in network.modules()]
    state = torch.get_rng_state()
    learner = adopted(network)
    assert torch.equal(torch.get_rng_state(), state)
    learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert np.isfinite([prediction.score for prediction in learner.predict(images(4))]).all()


@pytest.mark.slow
def test_wrappers_are_taken_off(network: Any, tmp_path: Path) -> None:
    plain = adopted(network).predict(images(3))
    wrappers: list[Any] = [torch.compile(network), nn.DataParallel(network)]
    for wrapped in wrappers:
        learner = adopted(wrapped)
        assert learner.predict(images(3)) == plain
        assert Learner.load(learner.save(tmp_path / "m"), "cpu", backbone=wrapped).predict(images(3)) == plain


def test_a_file_loads_with_the_module_that_was_adopted(network: Any, train: Batches, tmp_path: Path) -> None:
    learner = adopted(network)
    learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
    path = learner.save(tmp_path / "m")
    without_head = copy.deepcopy(network)
    without_head[5] = nn.Identity()
    for given in (network, without_head, small(7), network.train()):
        assert Learner.load(path, "cpu", backbone=given).predict(images(3)) == learner.predict(images(3))
    assert isinstance(network[5], nn.Linear), "the caller's module keeps its head"


def test_a_head_in_the_middle_of_the_module_is_found_again(tmp_path: Path) -> None:
    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier, self.body = nn.Linear(16, 3), small()[:5]
            self.unused = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.body(x))

    module = HeadFirst()
    with pytest.raises(BackboneError, match="name the layer"):
        adopted(module)
    learner = adopted(module, head="classifier")
    assert Learner.load(learner.save(tmp_path / "m"), "cpu", backbone=HeadFirst()).predict(images(2)) == learner.predict(
        images(2)
    )


def test_a_file_says_what_does_not_fit(network: Any, tmp_path: Path) -> None:
    path = adopted(network).save(tmp_path / "m")
    without_bias: Any = small()
    longer: Any = small()
    wider = small()
    without_bias[0][0] = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
    longer[2] = nn.Sequential(*longer[2], nn.Conv2d(16, 16, 1))
    wider[0], wider[1] = block(3, 12), block(12, 16)
    for given, message in (
        (without_bias, r"also has 0\.0\.bias"),
        (longer, r"lacks 2\.3\.bias, 2\.3\.weight, 5\.bias and 1 more"),
        (nn.Flatten(), "and 18 more"),
        (models.resnet18(), "lacks bn1.bias, bn1.num_batches_tracked, bn1.running_mean and"),
    ):
        with pytest.raises(ModelFileError, match=message):
            Learner.load(path, "cpu", backbone=given)
    narrower = small()
    narrower[0] = block(3, 4)
    with pytest.raises(ModelFileError, match="size mismatch"):
        Learner.load(path, "cpu", backbone=narrower)


def test_a_name_must_compute_what_the_module_computes() -> None:
    """The epsilon of a layer is in no state dict."""
    module = learnt(nn.Sequential(models.mobilenet_v3_small(num_classes=3)), 32)[0]
    assert adopted(module, image_size=32, backbone="mobilenet_v3_small").backbone == "mobilenet_v3_small"
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 0.5
    with pytest.raises(BackboneError, match="computes something else"):
        adopted(module, image_size=32, backbone="mobilenet_v3_small")


def test_auxiliary_heads_are_refused_unless_switched_off() -> None:
    module = models.googlenet(num_classes=3, init_weights=True)
    with pytest.raises(BackboneError, match="aux_logits=False"):
        adopted(module, image_size=32)


# Every family of torchvision: its smallest member, and the smallest image size at which it runs

FAMILIES = {
    "densenet121": 32,
    "efficientnet_b0": 32,
    "efficientnet_v2_s": 32,
    "googlenet": 32,
    "inception_v3": 75,
    "maxvit_t": 224,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_x_400mf": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "resnext50_32x4d": 32,
    "shufflenet_v2_x0_5": 32,
    "vgg11_bn": 32,
    "wide_resnet50_2": 32,
}
FAST = ("resnet18",)


ONE_STEP = QUICK.changed(
    {
        "schedule.min_steps": 1,
        "generator.steps": 1,
        "generator.batch": 4,
        "remember.pool": 8,
        "refine.epochs": 0,
        "refine.min_steps": 1,
    }
)


def as_by_name(name: str) -> nn.Module:
    auxiliary = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, num_classes=3, **auxiliary).eval()


@pytest.mark.filterwarnings("ignore:.*nothing to invert:UserWarning")
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in FAMILIES])
def test_a_family_is_adopted_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """By name and with the module given again, also after a further task."""
    x, module = images(3, FAMILIES[name]), as_by_name(name)
    for backbone in (name, None):
        learner = adopted(module, image_size=FAMILIES[name], backbone=backbone, recipe=ONE_STEP)
        given = module if backbone is None else None
        loaded = Learner.load(learner.save(tmp_path / "m"), "cpu", backbone=given)
        assert loaded.predict(x) == learner.predict(x)
    learner.learn_task([(x, torch.tensor([0, 0, 1]))], ["d", "e"], progress=False)
    assert Learner.load(learner.save(tmp_path / "m"), "cpu", backbone=module).predict(x) == learner.predict(x)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*nothing to invert:UserWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_exported(name: str, tmp_path: Path) -> None:
    learner = adopted(as_by_name(name), image_size=FAMILIES[name])
    x = (255 * images(3, FAMILIES[name])).byte()  # a file rounds others, and an untrained network can amplify that
    learner.export(tmp_path / "m.onnx")
    there = OnnxClassifier(tmp_path / "m.onnx").probabilities(x.numpy())
    assert np.abs(there - learner.network(x).softmax(1).detach().numpy()).max() < 1e-3


def test_every_listed_network_of_torchvision_belongs_to_a_tested_family() -> None:
    def kind(name: str) -> object:
        return inspect.signature(models.get_model_builder(name)).return_annotation

    listed = {kind(name.partition(":")[2]) for name in list_backbones("torchvision:*")}
    assert listed == {kind(name) for name in FAMILIES}
    assert len(listed) > 8


# The command line's modules


def test_a_module_is_loaded_by_the_name_of_its_callable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\n"
        "def build(): return nn.Linear(2, 3)\n"
        "ready = nn.Linear(4, 5)\n"
        "class Space:\n    @staticmethod\n    def build(): return nn.Linear(6, 7)\n"
        "number = 5\n"
        "def fails(): raise OSError('no such weights')\n"
        "def wrong(): return {}\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert adoption.load_callable("my_networks:build").out_features == 3
    assert adoption.load_callable("my_networks:ready").out_features == 5
    assert adoption.load_callable("my_networks:Space.build").out_features == 7
    for text, message in {
        "my_networks": "package.module:callable",
        ":build": "package.module:callable",
        "my_networks:": "package.module:callable",
        "no_such_package.x:build": "cannot be imported: ModuleNotFoundError",
        "my_networks:other": "cannot be imported: AttributeError",
        "my_networks:number": "is a int",
        "my_networks:fails": "raised OSError when called: no such weights",
        "my_networks:wrong": "my_networks:wrong must be a torch.nn.Module; a state dict",
    }.items():
        with pytest.raises(BackboneError, match=message):
            adoption.load_callable(text)
    assert sys.path == path


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="torch's threads after a fork are tested on Linux only")
@pytest.mark.slow
def test_a_forked_worker_answers() -> None:
    """As in a server that loads the model and forks its workers. In a separate process, without the threads of pytest."""
    done = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent.parent
    )
    assert done.stdout.split() == ["2", "1", "0"], done.stderr


FORKED = """
import os, signal, torch
from edge_dfcil import Learner
torch.set_num_threads(2)
learner = Learner("resnet8", image_size=32, device="cpu")
images = torch.rand(64, 3, 32, 32)
with torch.no_grad():
    learner.network.backbone(images)
print(torch.get_num_threads(), flush=True)
child = os.fork()
if child == 0:
    signal.alarm(30)  # rather than hang
    with torch.no_grad():
        learner.network.backbone(images)
    print(torch.get_num_threads(), flush=True)
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""
