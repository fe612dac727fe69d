"""YAML is read without surprises and written as people write it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hydralv_tune.config.errors import ConfigError
from hydralv_tune.config.yaml_io import dump_yaml, parse_yaml, read_yaml_mapping


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("1E+3", 1000.0), ("-2e-1", -0.2), (".5", 0.5), ("3.", 3.0), ("1.0e-8", 1e-8),
     (".inf", float("inf")), ("7", 7), ("0-1", "0-1"), ("3d", "3d"), ("1e", "1e"), ("null", None),
     ("true", True), ("[1e-3, 2]", [1e-3, 2])],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2(text: str, value: object) -> None:
    read = parse_yaml(text, "here")
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system ['touch /tmp/hydralv_ran']", "!!python/name:os.system",
     "a: !!python/object/new:type {}"],
)  # fmt: skip
def test_code_is_never_run(text: str) -> None:
    marker = Path("/tmp/hydralv_ran")
    with pytest.raises(ConfigError, match=r"here:.* no valid YAML"):
        parse_yaml(text, "here")
    assert not marker.exists()


def test_a_fault_is_told_with_line_and_column() -> None:
    with pytest.raises(ConfigError, match=r"x\.yaml: line 2, column 4: this is no valid YAML"):
        parse_yaml("a: 1\nb: : 2", "x.yaml")


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"line 3, column 3: .*'lr' stands twice"):
        parse_yaml("o:\n  lr: 1\n  lr: 2\n", "x.yaml")


def test_a_mapping_as_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="plain word"):
        parse_yaml("? [1, 2]\n: 3\n", "x.yaml")


def test_deep_nesting_is_no_crash() -> None:
    with pytest.raises(ConfigError):
        parse_yaml("[" * 20000, "x.yaml")


def test_a_value_inside_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match="no valid YAML: found unconstructable recursive node"):
        parse_yaml("a: &a {b: *a}", "x.yaml")
    with pytest.raises(ConfigError, match="recursive"):
        parse_yaml("model: {filters: &l [*l, 2]}", "x.yaml")


def test_aliases_of_aliases_without_end_are_refused_at_once() -> None:
    lines = ["a0: &a0 [1, 2]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    with pytest.raises(ConfigError, match=r"x\.yaml: its aliases repeat so much"):
        parse_yaml("\n".join(lines), "x.yaml")
    assert parse_yaml("\n".join(lines[:8]), "x.yaml")["a1"] == [[1, 2], [1, 2]]


def test_a_file_holds_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("")
    assert read_yaml_mapping(path) == {}
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: holds a list, but must be a mapping"):
        read_yaml_mapping(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="no UTF-8 text"):
        read_yaml_mapping(path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_yaml_mapping(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_yaml_mapping(tmp_path)


def test_what_is_written_is_read_back() -> None:
    value = {
        "model": {"filters": [8, 16], "loss_kwargs": [{"beta": 0.1}, {}], "norm": None},
        "lr": 1e-5, "big": 1e22, "name": "0-1", "yes": "true", "text": "a: b", "inf": float("inf"),
    }  # fmt: skip
    text = dump_yaml(value)
    assert parse_yaml(text, "here") == value
    assert "filters: [8, 16]" in text
