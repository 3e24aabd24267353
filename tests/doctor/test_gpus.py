import pytest

from dist_fusion.config import load
from dist_fusion.doctor.gpus import has_kernels, precision, remedy, tried
from dist_fusion.doctor.lines import FAIL
from tests.doctor.cases import case, grades

WHEEL_OF_2_10 = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
WHEEL_OF_2_11 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
V100, T4, A100, L4, H100, B200 = (7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (10, 0)


@pytest.mark.parametrize("capability", [V100, T4, A100, L4, H100, B200])
def test_the_wheel_of_the_lock_has_code_for_all_gpus_from_v100_on(capability):
    assert has_kernels(WHEEL_OF_2_10, capability)


def test_later_wheels_have_none_for_v100_and_the_remedy_names_those_that_have():
    assert not has_kernels(WHEEL_OF_2_11, V100) and has_kernels(WHEEL_OF_2_11, T4)
    assert "torch==2.10.0" in remedy(V100) and "cu126" in remedy(V100)


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("sm_80", (8, 6), True),  # machine code runs on later minor numbers,
        ("sm_86", (8, 0), False),  # not on earlier ones,
        ("sm_80", (9, 0), False),  # and not on other major numbers;
        ("compute_80", (9, 0), True),  # PTX is compiled for those that are later
        ("compute_80", (7, 0), False),
        ("sm_90a", (9, 0), True),  # of this one alone
        ("sm_90a", (9, 1), False),
        ("sm_120", (12, 1), True),
        ("gfx90a", (9, 0), False),
    ],
)
def test_code_runs_on_its_own_major_number_and_ptx_on_later_ones(built, capability, runs):
    assert has_kernels([built], capability) == runs


def test_a_rank_computes_on_its_own_gpu_and_a_process_alone_on_all():
    assert [*tried(4, {})] == [*tried(4, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})] == [0, 1, 2, 3]
    places = [{"RANK": str(8 + place), "WORLD_SIZE": "16", "LOCAL_RANK": str(place)} for place in range(8)]
    assert [[*tried(8, place)] for place in places] == [[place] for place in range(8)]
    assert [[*tried(1, place)] for place in places] == [[0]] * 8, "where each sees its own alone"


def test_gpus_before_v100_are_told_to_be_too_old_and_newer_ones_to_need_a_newer_torch():
    assert "not supported" in remedy((6, 1)) and "newer torch, built for sm_130" in remedy((13, 0))


def test_a_recipe_in_fp16_is_red_where_there_is_no_gpu(small_recipe, tmp_path):
    lines = precision(case(tmp_path, load(small_recipe, ["deepspeed=zero1-fp16"])))
    assert grades(lines) == [FAIL] and "needs a GPU" in lines[0].said and "python -m launcher doctor" in lines[0].remedy
