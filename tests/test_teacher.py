import pytest
import torch

from panterra.models.olmoearth import OlmoEarth, OlmoEarthConfig
from panterra.objectives.teacher import Teacher, follow, fresh_teacher, momentum_at

CONFIG = OlmoEarthConfig(dim=16, depth=1, heads=2, modalities=("sentinel2_l2a", "worldcover"))


@pytest.fixture
def student():
    torch.manual_seed(0)
    return OlmoEarth(CONFIG)


def draw():
    return {"sentinel2_l2a": torch.rand(2, 3, 12, 8, 8), "worldcover": torch.rand(2, 1, 1, 8, 8)}


def test_a_teacher_stays_what_the_student_was(student):
    inputs = draw()
    before = {m: x.detach() for m, x in student.embed_patches(inputs, 4).items()}
    teacher = Teacher(student)
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(1)
    for m, x in teacher(inputs, 4).items():
        assert torch.equal(x, before[m])
        assert not x.requires_grad
    assert not any(weight.requires_grad for weight in teacher.parameters())


def test_a_teacher_has_the_output_projection_of_its_student():
    student = OlmoEarth(OlmoEarthConfig(dim=16, depth=1, heads=2, modalities=("worldcover",), output_dim=6))
    inputs = {"worldcover": torch.rand(2, 1, 1, 8, 8)}
    expected = student.output(student.embed_patches(inputs, 4)["worldcover"])
    torch.testing.assert_close(Teacher(student)(inputs, 4)["worldcover"], expected)


def test_a_fresh_teacher_is_another_one_and_comes_from_its_seed(student):
    state = torch.random.get_rng_state()
    one, same, other = (fresh_teacher(student, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    name = "patch_embeddings.sentinel2_l2a.0.proj.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.allclose(one[name], other[name])
    assert not torch.allclose(one[name], student.state_dict()[name])


def test_following_is_an_exponential_moving_average(student):
    teacher = fresh_teacher(student, seed=3)
    before = {name: weight.clone() for name, weight in teacher.named_parameters()}
    follow(teacher, student, 0.9)
    weights = dict(student.named_parameters())
    for name, weight in teacher.named_parameters():
        torch.testing.assert_close(weight, 0.9 * before[name] + 0.1 * weights[name])
    frozen = {name: weight.clone() for name, weight in teacher.named_parameters()}
    follow(teacher, student, 1.0)
    for name, weight in teacher.named_parameters():
        assert torch.equal(weight, frozen[name])


def test_momentum_moves_from_its_start_to_its_end():
    assert [momentum_at(step, 10, start=0.996, end=1.0) for step in (0, 5, 10)] == pytest.approx([0.996, 0.998, 1.0])
