import resource

from dist_fusion.config import load
from dist_fusion.doctor.host import cores, host_memory, open_files, shared_memory
from dist_fusion.doctor.lines import FAIL, OK, WARN
from tests.doctor.cases import case, facts, grades


def test_a_host_without_memory_for_what_is_saved_beside_the_steps_is_red(small_recipe, tmp_path):
    config = load(small_recipe)
    assert grades(host_memory(case(tmp_path, config, facts(config, 1e6)))) == [OK]
    (line,) = host_memory(case(tmp_path, config, facts(config, 1e12)))
    assert line.grade == FAIL and "save_async=false" in line.remedy
    at_once = load(small_recipe, ["save_async=false"])
    assert grades(host_memory(case(tmp_path, at_once, facts(config, 1e12)))) == [OK]


def test_loader_workers_want_cores_and_shared_memory(small_recipe, tmp_path):
    greedy = load(small_recipe, ["data.num_workers=4000"])
    assert grades(cores(case(tmp_path, greedy))) == [WARN]
    assert grades(shared_memory(case(tmp_path, load(small_recipe, ["data.num_workers=1"])))) == [OK]
    huge = load(small_recipe, ["data.num_workers=4000", "model.image_size=1024"])
    (line,) = shared_memory(case(tmp_path, huge))
    assert line.grade == FAIL and "--ipc=host" in line.remedy


def test_few_open_files_are_told_with_the_number_that_is_allowed(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for few, grade in ((200, FAIL), (512, WARN), (1024, OK)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (few, before[1]))
            assert grades(open_files(case(tmp_path))) == [grade]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
