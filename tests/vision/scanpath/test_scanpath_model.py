"""The scanpath model: position codes, looks of objects, the pointer, teacher forcing, and bad input."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vision.scanpath.appearance import CropCNN, FrozenBackbone, SpatialPyramidPool, cut
from vision.scanpath.decoding import greedy, sample
from vision.scanpath.metrics import next_object
from vision.scanpath.model import OAT, OATConfig, next_objects, teacher_forcing_loss
from vision.scanpath.objects import Objects, RegularGrid
from vision.scanpath.positions import DistanceCode, PositionCode
from vision.scanpath.scenes import PAD, Scenes, pad_scanpaths

GAUSSIAN = [1, 0.882497, 0.606531, 0.324652, 0.135335, 0.043937, 0.011109]  # exp(-d² / 8)
SMALL: dict[str, Any] = {"dim": 96, "position_dim": 72, "depth": 2, "mlp_dim": 64, "extent": (6, 6)}
LARGE: dict[str, Any] = {"dim": 320, "position_dim": 256, "depth": 1, "mlp_dim": 64}
BLIND = OATConfig(**SMALL, appearance="none")
SEEING = OATConfig(**SMALL, appearance="features", feature_dim=5)


def cells(rows: int, columns: int) -> Tensor:
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()


def size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def seeing_scenes(*shapes: tuple[int, int]) -> Scenes:
    places = [cells(*shape) for shape in shapes]
    looks = [torch.randn(len(place), 5) for place in places]
    return Scenes.stack(places, [len(place) // 2 for place in places], looks)


# --- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 14, 84])
def test_distance_codes_are_equally_long_and_as_alike_as_near(count: int):
    codes = DistanceCode(86, (count,))(torch.arange(count)[:, None]).double()
    distance = torch.arange(count)[:, None] - torch.arange(count)
    expected = torch.exp(-(distance.double() ** 2) / 8)
    torch.testing.assert_close(codes @ codes.T, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(count).double(), atol=1e-6, rtol=0)
    seen = (codes @ codes[0])[:7].tolist()
    assert seen == pytest.approx(GAUSSIAN[:count], abs=1e-5)


def test_distance_codes_of_the_plane_follow_distance_in_pixels():
    code = DistanceCode(244, (1578, 2506), sigma=440)  # 6 x 14 cells of 263 x 179 pixels
    points = torch.rand(500, 2) * torch.tensor([1578, 2506])
    codes = code(points).double()
    expected = torch.exp(-(torch.cdist(points.double(), points.double()) ** 2) / (2 * 440**2))
    torch.testing.assert_close(codes @ codes.T, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(500).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["distance", "distance_2d"])
def test_a_position_code_is_of_place_and_flag(kind: Any):
    code = PositionCode(kind, 256, (6, 14))
    places, flags = torch.rand(200, 2) * torch.tensor([5, 13]), torch.arange(200) % 2
    codes = code(places, flags).double()
    torch.testing.assert_close(codes.norm(dim=1), torch.full((200,), 16.0).double(), atol=1e-4, rtol=0)

    def gaussian(difference: Tensor) -> Tensor:
        return torch.exp(-(difference.double() ** 2) / 8)

    vertical, horizontal = (gaussian(places[:, None, axis] - places[:, axis]) for axis in (0, 1))
    flag = gaussian(flags[:, None] - flags)
    place = vertical + horizontal if kind == "distance" else 2 * vertical * horizontal
    torch.testing.assert_close(codes @ codes.T / 256, (place + flag) / 3, atol=1e-5, rtol=0)


def test_a_grid_has_the_same_code_for_the_same_row_and_column():
    rows = PositionCode("distance", 256, (6, 14))(torch.tensor([[3.0, 3.0]]), torch.zeros(1))
    torch.testing.assert_close(rows[:, :86], rows[:, 86:172])


def test_position_codes_survive_half_precision_and_autocast():
    code, places, flags = PositionCode("distance", 256, (6, 14)), cells(6, 14), torch.zeros(84)
    expected = code(places, flags)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(code(places, flags), expected)
    torch.testing.assert_close(code.bfloat16()(places, flags), expected)


def test_a_sinusoid_does_not_follow_distance_and_learned_codes_learn():
    likeness = PositionCode("sinusoidal", 256, (14, 14))
    codes = likeness(torch.stack((torch.arange(14.0), torch.zeros(14)), 1), torch.zeros(14))[:, :86]
    torch.testing.assert_close(codes.norm(dim=1), torch.full((14,), math.sqrt(256 / 3)))
    cosine = (codes @ codes[0]) / codes[0].square().sum()
    assert (cosine[:7] - torch.tensor(GAUSSIAN)).abs().max() > 0.3
    learned = PositionCode("learned", 256, (6, 14))
    assert size(learned) == 14 * 86 + 2 * 84 and not any(size(PositionCode(k)) for k in ("distance", "sinusoidal"))
    flags = torch.ones(84, dtype=torch.bool)  # as models give them
    learned(cells(6, 14), flags).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in learned.parameters())


# --- looks ------------------------------------------------------------------------------------------------------------


def test_crops_are_what_the_boxes_hold():
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:20, :30] = (255, 0, 0)
    pixels[20:, 30:] = (0, 0, 51)
    picture, objects = Image.fromarray(pixels), RegularGrid(2, 2).on((60, 40))
    crops = cut(picture, objects, (6, 4))
    assert isinstance(crops, Tensor) and crops.shape == (4, 3, 6, 4)
    inner = crops[:, :, 1:-1, 1:-1].amax((2, 3))
    torch.testing.assert_close(inner, torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0.2]]))
    unequal = cut(picture, Objects(np.array([[0, 0, 60, 30], [5, 5, 10, 15]]), (60, 40)), None, min_side=20)
    assert [list(crop.shape) for crop in unequal] == [[3, 30, 60], [3, 40, 20]]


def test_the_crop_network_is_the_papers():
    cnn = CropCNN()
    assert size(cnn) == 374_752
    crops = torch.rand(2, 3, 150, 93)
    maps = cnn.pool2[0](cnn.conv2(cnn.pool1(cnn.conv1(2 * crops - 1).relu())).relu())  # type: ignore[index]
    assert maps.shape == (2, 32, 9, 5)
    torch.testing.assert_close(cnn(crops), cnn.proj(maps.flatten(1)))


def test_a_pyramid_makes_one_vector_of_any_size():
    x = torch.rand(1, 2, 7, 5)
    pooled = SpatialPyramidPool((1, 2))(x)[0].tolist()
    corners = [x[0, c, i, j].max() for c in (0, 1) for i in (slice(4), slice(3, 7)) for j in (slice(3), slice(2, 5))]
    assert pooled == [float(m) for m in (x[0, 0].max(), x[0, 1].max(), *corners)]
    cnn = CropCNN(16, pyramid=(1, 2, 4))
    crops = [torch.rand(3, 150, 93), torch.rand(3, 31, 80), torch.rand(3, 19, 19)]
    together = cnn(crops)
    assert together.shape == (3, 16)
    for crop, vector in zip(crops, together, strict=True):
        torch.testing.assert_close(cnn(crop[None])[0], vector)


def test_a_backbone_is_frozen_and_a_linear_layer_learns():
    look = FrozenBackbone("test_resnet", 8, pyramid=(1, 2)).train()
    before = {name: value.clone() for name, value in look.backbone.state_dict().items()}
    crops = torch.rand(3, 3, 64, 48)
    look(crops).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in look.backbone.state_dict().items())
    assert {name for name, weight in look.named_parameters() if weight.grad is not None} == {"proj.weight", "proj.bias"}
    torch.testing.assert_close(look([crops[0], crops[1, :, :40]])[0], look(crops)[0])


@pytest.mark.parametrize(("name", "side"), [("test_vit", 160), ("biformer_stl", 64)])
def test_backbones_without_convolutions_serve_too(name: str, side: int):
    assert FrozenBackbone(name, 8)(torch.rand(2, 3, side, side)).shape == (2, 8)


# --- the model --------------------------------------------------------------------------------------------------------


def test_the_model_has_the_papers_parameters():
    model = OAT()
    parts = [size(part) for part in (model.encoder, model.decoder, model.appearance, model.pointer) if part]
    assert parts == [6_311_936, 10_518_528, 374_752, 1_050_627] and sum(parts) == 18_255_843
    assert size(model) - sum(parts) == model.blank.numel() == 256  # where the paper has a blank crop
    first, second = model.encoder.layers[:2]
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


@pytest.mark.parametrize(("rows", "columns"), [(2, 11), (3, 9), (6, 14), (1, 1), (20, 25)])
def test_shapes(rows: int, columns: int):
    n = rows * columns
    model = OAT(OATConfig(**LARGE, extent=(20, 25), appearance="cnn", crop_size=(36, 24), pools=(2, 2))).eval()
    scenes = Scenes.stack([cells(rows, columns)], [n // 2], [torch.rand(n, 3, 36, 24)])
    logits = model(scenes, pad_scanpaths([[0, n // 2, n - 1]]))
    assert logits.shape == (1, 4, n + 1) and logits.dtype == torch.float32
    assert logits[0, 0, -1] == -torch.inf and logits.isinf().sum() == 1  # no end before the first fixation


def test_what_comes_later_does_not_change_what_came_before():
    model, scenes = OAT(SEEING).eval(), seeing_scenes((3, 4))
    a, b = model(scenes, pad_scanpaths([[1, 2, 3, 4]])), model(scenes, pad_scanpaths([[1, 2, 7, 4]]))
    torch.testing.assert_close(a[:, :3], b[:, :3])
    assert (a[:, 3] - b[:, 3]).abs().max() > 1e-3


def test_the_pointer_follows_the_objects():
    model, scenes = OAT(SEEING).eval(), seeing_scenes((3, 4))
    order = torch.randperm(12)
    assert isinstance(scenes.looks, Tensor)
    place = order.argsort()  # where each object went
    moved = Scenes.stack([scenes.positions[0, order]], [int(place[scenes.targets[0]])], [scenes.looks[order]])
    path = torch.tensor([[5, 6, 6, 0]])
    a, b = model(scenes, path), model(moved, place[path])
    torch.testing.assert_close(b[..., :-1], a[..., order])
    torch.testing.assert_close(b[..., -1], a[..., -1])


@pytest.mark.parametrize("training", [False, True])
def test_other_scenes_of_the_batch_do_not_matter(training: bool):
    config = OATConfig(**SMALL, appearance="none", dropout=0.0) if training else SEEING
    model, (large, small) = OAT(config).train(training), (seeing_scenes((5, 6)), seeing_scenes((2, 3)))
    both = Scenes.stack(
        [large.positions[0], small.positions[0]], [*large.targets, *small.targets], [large.looks, small.looks]
    )
    together = model(both, pad_scanpaths([[29, 3, 3, 1, 2], [4, 5]]))
    torch.testing.assert_close(together[0], model(large, pad_scanpaths([[29, 3, 3, 1, 2]]))[0])
    alone = model(small, pad_scanpaths([[4, 5]]))[0]
    torch.testing.assert_close(together[1, :3, [*range(6), 30]], alone)
    assert (together[1, :, 6:30] == -torch.inf).all()


def test_scanpaths_of_one_scene_share_its_encoding():
    model, scenes = OAT(SEEING).eval(), seeing_scenes((3, 4), (2, 2))
    paths = pad_scanpaths([[1, 2], [0, 3, 3], [11]])
    seen: list[int] = []
    model.encoder.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    together = model(scenes, paths, scene_of=torch.tensor([0, 1, 0]))
    assert seen == [2]
    assert isinstance(scenes.looks, Tensor)
    alone = Scenes(scenes.positions[:1], scenes.targets[:1], scenes.counts[:1], scenes.looks[:12])
    torch.testing.assert_close(together[2, :2], model(alone, torch.tensor([[11]]))[0])


def test_scenes_share_looks_that_are_seen_once():
    model, scenes = OAT(SEEING).eval(), seeing_scenes((2, 3), (2, 2))
    assert isinstance(scenes.looks, Tensor) and model.appearance is not None
    index = torch.tensor([0, 0, 1])
    own = torch.cat((scenes.looks[:6], scenes.looks))  # the first scene's twice
    several = [part[index] for part in (scenes.positions, torch.tensor([3, 2]), scenes.counts)]
    several[1][1] = 0  # with another target
    look_of = torch.tensor([*range(6), *range(10)])
    seen: list[int] = []
    model.appearance.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    shared = model.encode(Scenes(*several, scenes.looks, look_of).to("cpu"))
    alone = model.encode(Scenes(*several, own))
    assert seen == [10, 16]
    torch.testing.assert_close(shared.memory, alone.memory)
    assert not torch.allclose(shared.memory[0], shared.memory[1])
    with pytest.raises(ValueError, match="looks of 15 of 16 objects"):
        model.encode(Scenes(*several, scenes.looks, look_of[:-1]))


def test_the_decoder_is_told_when_the_target_is_fixated():
    encoded = OAT(BLIND).eval().encode(Scenes.stack([cells(2, 2)], [2]))
    code = PositionCode("distance", 72, (6, 6))
    flags = torch.tensor([0, 0, 1, 0])
    torch.testing.assert_close(encoded.tokens[0, :4, 24:], code(cells(2, 2), flags))


def test_a_search_starts_in_the_middle():
    model = OAT(OATConfig(**SMALL | {"extent": (6, 14)}, appearance="none"))
    code = PositionCode("distance", 72, (6, 14))
    start = model.encode(Scenes.stack([cells(3, 9), cells(6, 14)], [0, 0])).tokens[:, -1]
    torch.testing.assert_close(start[:, :24], model.blank.expand(2, -1))
    torch.testing.assert_close(start[:, 24:], code(torch.tensor([[1.0, 4.0], [3.0, 7.0]]), torch.zeros(2)))
    free = OAT(OATConfig(**LARGE, extent=(600, 800), position="distance_2d", sigma=300, appearance="none"))
    start = free.encode(Scenes.stack([torch.tensor([[100.0, 100], [200, 701]])], [0])).tokens[0, -1]
    torch.testing.assert_close(start[64:], free.position(torch.tensor([150.0, 400.5]), torch.tensor(0.0)))


@pytest.mark.parametrize(
    ("token", "place_matters", "look_matters"), [("full", 1, 1), ("appearance", 0, 1), ("none", 0, 0)]
)
def test_the_token_of_the_target_tells_what_it_is_to_tell(token: Any, place_matters: bool, look_matters: bool):
    model = OAT(OATConfig(**SMALL, appearance="features", feature_dim=5, target_token=token)).eval()
    tokens: list[Tensor] = []
    model.encoder.register_forward_pre_hook(lambda module, args: tokens.append(args[0][:, -1]))
    looks = torch.randn(4, 5)
    looks[1] = looks[0]
    for target in (0, 1, 3):
        model.encode(Scenes.stack([cells(2, 2)], [target], [looks]))
    same = [torch.equal(tokens[0], other) for other in tokens[1:]]
    assert same == [not place_matters, not look_matters and not place_matters]


def test_free_objects_of_unequal_size():
    config = OATConfig(**LARGE, extent=(60, 100), position="distance_2d", sigma=30, appearance="cnn", pyramid=(1, 2))
    objects = Objects(np.array([[0, 0, 40, 25], [10, 5, 60, 50], [50, 30, 90, 60]]), (100, 60))
    crops = cut(Image.effect_mandelbrot((100, 60), (-2, -1, 1, 1), 50), objects, None)
    model = OAT(config).eval()
    scenes = Scenes.of_objects([objects], [1], [crops], place="centres")
    assert scenes.positions[0].tolist() == [[12.5, 20], [27.5, 35], [45, 70]]  # y, x
    logits = model(scenes, torch.tensor([[0, 1, 1]]))
    assert logits.shape == (1, 4, 4) and logits[:, 1:].isfinite().all()


def test_a_frozen_backbone_in_the_model_keeps_its_weights():
    config = OATConfig(**SMALL, appearance="backbone", backbone="test_resnet")
    model, crops = OAT(config), torch.rand(4, 3, 64, 64)
    again = OAT(config)
    again.load_state_dict(model.state_dict())
    scenes, path = Scenes.stack([cells(2, 2)], [0], [crops]), torch.tensor([[0, 1]])
    assert not any(w.requires_grad for n, w in model.named_parameters() if n.startswith("appearance.backbone."))
    torch.testing.assert_close(model.eval()(scenes, path), again.eval()(scenes, path))


def test_looks_are_of_the_scale_of_positions_and_seen():
    model = OAT(SEEING).train()
    scenes = seeing_scenes((5, 6))
    assert isinstance(scenes.looks, Tensor)
    tiny = Scenes(scenes.positions, scenes.targets, scenes.counts, 0.1 * scenes.looks + 3)
    mean_square = model.encode(tiny).tokens[:, :-1].detach().square().mean((0, 1))
    assert mean_square[:24].mean() == pytest.approx(1, abs=0.1) and mean_square[24:].mean() == pytest.approx(
        1, abs=0.01
    )


def test_a_configuration_is_json_and_back():
    config = OATConfig(**SMALL, appearance="cnn", pyramid=(1, 2))
    assert OATConfig(**json.loads(json.dumps(config.to_dict()))) == config


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_fixations_and_ends():
    model, scenes = OAT(SEEING).eval(), seeing_scenes((3, 4), (2, 2))
    paths = [[1, 2, 2, 5, 6], [3, 0]]
    logits = model(scenes, pad_scanpaths(paths))
    nats = []
    for row, path, end in zip(logits.log_softmax(-1), paths, (12, 12), strict=True):
        nats += [-row[t, item].item() for t, item in enumerate([*path, end])]
    assert len(nats) == 9
    loss = teacher_forcing_loss(logits, pad_scanpaths(paths))
    assert loss.item() == pytest.approx(np.mean(nats), rel=1e-5)
    following = next_objects(pad_scanpaths(paths), end=12)
    assert following.tolist() == [[1, 2, 2, 5, 6, 12], [3, 0, 12, PAD, PAD, PAD]]
    report = next_object(logits.log_softmax(-1), following, PAD)
    assert report["nats"] == pytest.approx(loss.item(), rel=1e-5)


def test_longer_padding_does_not_change_the_loss():
    model, scenes = OAT(SEEING).eval(), seeing_scenes((3, 4))
    path = torch.tensor([[4, 7]])
    padded = torch.tensor([[4, 7, PAD, PAD]])
    short, long = (teacher_forcing_loss(model(scenes, p), p) for p in (path, padded))
    torch.testing.assert_close(short, long)


def test_every_weight_learns():
    model = OAT(SEEING)
    scenes, paths = seeing_scenes((3, 4), (2, 5)), pad_scanpaths([[1, 2, 2], [9]])
    teacher_forcing_loss(model(scenes, paths), paths).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
        # One number added to all logits changes no probability.
        assert weight.grad.abs().max() > 0 or name == "pointer.merge.bias", name


def searches(count: int) -> tuple[Scenes, Tensor]:
    """A made-up searcher: the object above the target, the target, and on to the object whose look is the target's."""
    rng = np.random.default_rng(0)
    looks, targets, paths = [], [], []
    for _ in range(count):
        target = int(rng.integers(3, 9))
        twin = int(rng.choice([n for n in range(9) if n not in (target, target - 3)]))
        look = torch.from_numpy(rng.normal(size=(9, 5))).float()
        look[twin] = look[target]
        looks.append(look)
        targets.append(target)
        paths.append([target - 3, target, twin])
    return Scenes.stack([cells(3, 3)] * count, targets, looks), pad_scanpaths(paths)


def test_training_on_made_up_searches_lowers_the_loss_and_decoding_follows_them():
    model = OAT(OATConfig(**SMALL | {"depth": 1}, appearance="features", feature_dim=5, dropout=0.0))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    scenes, paths = searches(64)
    losses = []
    for _ in range(60):
        loss = teacher_forcing_loss(model(scenes, paths), paths)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.5 and losses[-1] < 0.1
    assert (greedy(model, scenes).objects[:, 0] == paths).float().mean() > 0.95
    drawn = sample(model, scenes, 5, generator=torch.Generator().manual_seed(0))
    assert drawn.ended.float().mean() > 0.95 and np.mean([len(p) for scene in drawn.tolist() for p in scene]) < 3.5


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Scenes.stack([cells(2, 2)], [4]), "target=4 is not among the objects of scene 0, which are 0 to 3"),
        (lambda: Scenes.stack([cells(2, 2), cells(1, 1)], [0, -1]), "target=-1 is not among the objects of scene 1"),
        (lambda: Scenes.stack([], []), "0 scenes, 0 targets"),
        (lambda: Scenes.stack([cells(2, 2)], [0, 1]), "1 scenes, 2 targets"),
        (lambda: Scenes.stack([np.zeros((0, 2))], [0]), "expected [N, 2] with N at least 1, got [0, 2]"),
        (lambda: Scenes.stack([[[0, 1], [0, math.nan]]], [0]), "positions of scene 0: object 1 is not finite"),
        (lambda: Scenes.stack([cells(2, 2)], [0], [torch.zeros(3, 5)]), "scene 0 has 4 objects and 3 looks"),
        (lambda: Scenes.of_objects([Objects(np.array([[0, 0, 1, 1]]), (9, 9))], [0]), "scene 0 have no cells"),
        (lambda: pad_scanpaths([[1, 2], []]), "scanpaths of lengths [2, 0]"),
        (lambda: pad_scanpaths([]), "scanpaths of lengths []"),
        (lambda: pad_scanpaths([[-1]]), "objects count from 0"),
        (
            lambda: OAT(BLIND)(Scenes.stack([cells(2, 2)], [0]), torch.tensor([[4]])),
            "object 4; its scene has objects 0 to 3",
        ),
        (lambda: OAT(BLIND)(Scenes.stack([cells(2, 2)], [0]), torch.tensor([[-1]])), "object -1"),
        (lambda: OAT(BLIND)(Scenes.stack([cells(2, 2)], [0]), torch.tensor([[PAD]])), "a scanpath without a fixation"),
        (lambda: OAT(BLIND)(Scenes.stack([cells(2, 2)], [0]), torch.tensor([[1, PAD, 1]])), "within a scanpath"),
        (lambda: OAT(BLIND)(Scenes.stack([cells(2, 2)], [0]), torch.tensor([[1], [1]])), "and a scene for each"),
        (lambda: OAT(BLIND).encode(Scenes.stack([cells(7, 1)], [0])), "object 6 of scene 0 is at [6.0, 0.0]"),
        (lambda: OAT(SEEING).encode(Scenes.stack([cells(2, 2)], [0])), "looks of none of 4 objects"),
        (
            lambda: OAT(SEEING).encode(Scenes.stack([cells(1, 2)], [0], [torch.zeros(2, 4)])),
            "expected features, 5 numbers",
        ),
        (lambda: DistanceCode(12, (9,)), "12 dimensions do not tell places apart that finely over (9,)"),
        (lambda: DistanceCode(86, (9,), sigma=0), "sigma=0 must be positive"),
        (lambda: PositionCode("polar"), "position='polar': expected one of 'distance'"),  # type: ignore[arg-type]
        (lambda: PositionCode(extent=(3, 0)), "extent=(3, 0): expected two positive sizes"),
        (lambda: PositionCode(dim=10), "dim=10: a position code needs"),
        (lambda: OATConfig(dim=100, num_heads=3), "dim=100 must be even, a multiple of num_heads=3"),
        (lambda: OATConfig(appearance="eyes"), "appearance='eyes': expected one of 'cnn'"),  # type: ignore[arg-type]
        (lambda: OATConfig(appearance="backbone"), "appearance='backbone' needs backbone"),
        (lambda: OATConfig(depth=0), "depth=0 must be at least 1"),
        (lambda: CropCNN(crop_size=(30, 20)), "crop_size=(30, 20) is too small for pools=(5, 3)"),
        (lambda: CropCNN()(torch.zeros(1, 3, 93, 150)), "crops of 93 x 150: expected (150, 93)"),
        (
            lambda: CropCNN()(torch.zeros(1, 150, 93)),
            "crops: expected [M, 3, H, W], or M of [3, H, W], got [1, 150, 93]",
        ),
        (lambda: CropCNN(pyramid=(1, 2))([torch.zeros(3, 18, 40)]), "a crop of 18 x 40: expected 19 or more"),
        (lambda: SpatialPyramidPool(()), "pyramid=(): expected sizes of grids"),
        (
            lambda: cut(Image.new("RGB", (9, 9)), Objects(np.array([[0, 0, 1, 1]]), (8, 9))),
            "a picture of (9, 9) pixels",
        ),
        (lambda: teacher_forcing_loss(torch.zeros(1, 2, 5), torch.zeros(1, 2)), "expected [P, T + 1, …]"),
    ],
)
def test_bad_input_is_named(call: Any, says: str):
    with pytest.raises(ValueError, match=re.escape(says)):
        call()


def test_objects_at_one_place_and_one_object_are_no_mistake():
    same = Scenes.stack([torch.ones(3, 2)], [0])
    assert OAT(BLIND).eval()(same, torch.tensor([[1]])).log_softmax(-1)[0, 0, :3].exp().tolist() == pytest.approx(
        [1 / 3] * 3
    )
    one = Scenes.stack([torch.zeros(1, 2)], [0])
    assert OAT(BLIND).eval()(one, torch.tensor([[0]]))[0, 0].softmax(-1).tolist() == [1, 0]
