"""recording/identity.py: what tells two results apart, in the key and on the disk."""

from pathlib import Path

import numpy as np
import pytest
from builders import CONFIGS
from made_up_records import make_record

import results
from recording.identity import config_hash, record_path, resume_key

CHECKPOINT = {"name": "checkpoint-10", "fingerprint": "ab" * 32}


def saved(folder, **changes) -> Path:
    """A record's path; its arrays and samples say which it is."""
    record, which = make_record(**changes), len(list(Path(folder).rglob("*.json")))
    return results.save_record(folder, record, {"which": np.array([which])}, [{"which": which}])


def everything(folder) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_keys_depend_on_what_they_should():
    a = config_hash({"x": 1, "y": [1.5, np.int64(2)]})
    assert a == config_hash({"y": (1.5, 2), "x": 1})
    assert a != config_hash({"x": 1, "y": [1.5, 3]})
    config = CONFIGS["gpt"].to_dict()
    parts = [{"fingerprint": "f", "config": config}, "mmlu", {"shots": 5}, "data", "code"]
    key = resume_key(*parts)
    assert key == resume_key(*parts[:2], config_hash({"shots": 5}), *parts[3:])
    elsewhere = parts[0] | {"name": "another", "path": "elsewhere", "step": 7}
    assert key == resume_key(elsewhere, *parts[1:])
    for i, other in enumerate(
        ({"fingerprint": "g", "config": config}, "perplexity", {"shots": 4}, "other", "other")
    ):
        assert resume_key(*parts[:i], other, *parts[i + 1 :]) != key
    wrong = CONFIGS["gpt"].replace(n_heads=4).to_dict()
    assert resume_key({"fingerprint": "f", "config": wrong}, *parts[1:]) != key
    assert resume_key({"fingerprint": "f"}, *parts[1:]) != key
    record = make_record(checkpoint=CHECKPOINT | {"config": config})
    assert record["resume_key"] == resume_key(
        record["checkpoint"], "mmlu", record["protocol"], "d" * 64, "c" * 64
    )


# Two of each that fall on one name: neither may cost the other anything
OTHER_WORK = {
    "another run": [{"run": "a b"}, {"run": "a_b"}, {"run": "a/b"}],
    "another checkpoint": [
        {"checkpoint": CHECKPOINT | {"name": name}} for name in ("c 1", "c_1", "c:1")
    ],
    "nameless": [{"run": "..."}, {"run": "?"}, {"run": "_"}],
    "content of the same first digits": [
        {"checkpoint": CHECKPOINT | {"fingerprint": "ab" * 4 + c * 56}} for c in "12"
    ],
    "a corrected config": [
        {"checkpoint": CHECKPOINT | {"config": config and config.to_dict()}}
        for config in (CONFIGS["gpt"], CONFIGS["gpt"].replace(n_heads=4), CONFIGS["llama"], None)
    ],
    "data that the protocol does not name": [{"data": {"hash": c * 64}} for c in "ab"],
    "a failure": [{"status": "failed", "reason": "torn", "metrics": {}}, {}],
    "long names": [{"run": "é" * 100 + "x" * n} for n in (50, 51)],
}


@pytest.mark.parametrize("kind", OTHER_WORK)
def test_no_record_takes_the_place_of_another_ones(kind, tmp_path):
    paths, kept = [], {}
    for changes in OTHER_WORK[kind]:
        paths.append(saved(tmp_path, **changes))
        found = everything(tmp_path)
        assert found.items() >= kept.items(), "something was overwritten"
        kept = found
    assert len(set(paths)) == len(paths) and len({path.parent for path in paths}) == 1
    assert len(kept) == 3 * len(paths)
    for i, (path, changes) in enumerate(zip(paths, OTHER_WORK[kind], strict=True)):
        record = results.load_record(path)
        assert results.load_arrays(record)["which"] == [i]
        assert results.load_samples(record) == [{"which": i}]
        # and each one's rerun, by newer code, goes where it was
        assert saved(tmp_path, **changes, code="e" * 64) == path
    assert everything(tmp_path).keys() == kept.keys()


def test_configurations_of_the_same_first_digits(tmp_path):
    record = make_record()
    twin = record | {"config_hash": record["config_hash"][:8] + "0" * 56}
    first = results.save_record(tmp_path, record)
    before = first.read_bytes()
    second = results.save_record(tmp_path, twin)
    assert second != first and first.read_bytes() == before
    assert results.save_record(tmp_path, record) == first


def test_a_file_system_without_case(tmp_path):
    """There `Base` and `base` are one folder; here a link makes them one."""
    one = saved(tmp_path, run="Base")
    (tmp_path / "base").symlink_to(tmp_path / "Base")
    other = saved(tmp_path, run="base")
    assert one.resolve() != other.resolve()
    assert [results.load_record(p)["run"] for p in (one, other)] == ["Base", "base"]


def test_newer_code_replaces_its_own_predecessor_wherever_that_lies(tmp_path):
    first, second = saved(tmp_path, run="a b"), saved(tmp_path, run="a_b")
    assert saved(tmp_path, run="a b", code="e" * 64) == first
    assert results.load_record(first)["code_version"] == "e" * 64
    first.unlink()  # the longer name stays the second one's
    assert saved(tmp_path, run="a_b", code="e" * 64) == second
    assert [r["_path"] for r in results.load_records(tmp_path)] == [str(second)]


def test_a_field_of_the_config_that_came_later_makes_no_other_work(tmp_path):
    config = CONFIGS["gpt"].to_dict()
    older = {name: value for name, value in config.items() if name != "sliding_window"}
    path = saved(tmp_path, checkpoint=CHECKPOINT | {"config": older})
    assert saved(tmp_path, checkpoint=CHECKPOINT | {"config": config}) == path
    other = config | {"n_heads": 4}
    assert saved(tmp_path, checkpoint=CHECKPOINT | {"config": other}) != path


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", "null", '{"checkpoint": 3}', '{"schema_version": 99, "run": "base"}'],
)
def test_what_cannot_be_read_is_not_replaced(content, tmp_path):
    """It may be a record of a later version, or half of a copy."""
    path = saved(tmp_path)
    path.write_text(content)
    other = saved(tmp_path)
    assert other != path and path.read_text() == content
    assert saved(tmp_path, code="e" * 64) == other


@pytest.mark.parametrize(
    "run", ["../../etc", "a/b", ".hidden", "..", "name with spaces", "run-é.1"]
)
def test_a_path_stays_inside(run):
    record = {"run": run, "checkpoint": {"name": "checkpoint-1", "fingerprint": "f" * 64}}
    path = record_path("R", record | {"evaluation": "mmlu", "config_hash": "c" * 64})
    assert len(path.parts) == 4 and ".." not in path.parts and not path.parts[1].startswith(".")
    assert path.name == "mmlu-cccccccc.json" and path.parts[2] == "checkpoint-1-ffffffff"
