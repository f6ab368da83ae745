"""Several subjects: the file that names them, and what is made of it."""

import json

import pytest
from given_options import error_of, train

from ldm.concepts import Concept, classes_of, read_concepts
from ldm.values import ConfigError

DOG = {
    "instance_data_dir": "dog", "instance_prompt": "a sks dog", "class_data_dir": "dogs",
    "class_prompt": "a dog",
}  # fmt: skip
CAT = {
    "instance_data_dir": "cat", "instance_prompt": "a zwx cat", "class_data_dir": "cats",
    "class_prompt": "a cat",
}  # fmt: skip


def written(tmp_path, listed):
    path = tmp_path / "concepts.json"
    path.write_text(json.dumps(listed))
    return path


def test_json_and_yaml_lists_are_read(tmp_path):
    listed = [
        DOG | {"num_class_images": 50, "class_negative_prompt": "blurry"},
        CAT | {"train_data_repeats": 7},
    ]
    concepts = read_concepts(written(tmp_path, listed), 200, 40)
    assert concepts == (Concept(**DOG, num_class_images=50), Concept(**CAT, train_data_repeats=7))
    yaml = tmp_path / "concepts.yaml"
    yaml.write_text("".join(
        "- " + "\n  ".join(f"{key}: {value}" for key, value in entry.items()) + "\n" for entry in (DOG, CAT)
    ))  # fmt: skip
    assert read_concepts(yaml, 100, 20) == tuple(
        Concept(**entry, num_class_images=100, train_data_repeats=20) for entry in (DOG, CAT)
    )


@pytest.mark.parametrize("listed, message", [
    ({"a": 1}, "must be a list of subjects, each with instance_data_dir, instance_prompt"),
    ([], "must be a list of subjects"),
    ([DOG, "cat"], "must be a list of subjects"),
    ([DOG, CAT | {"instance_promt": "x"}], "subject 2: unknown key instance_promt; did you mean instance_"),
    ([DOG | {"num_class_images": "many"}], "subject 1: num_class_images must be a whole number, got 'many'"),
    ([DOG | {"train_data_repeats": 0}], "subject 1: train_data_repeats must be 1 or more, got 0"),
    ([DOG, DOG], "dog is given for two subjects"),
    ([DOG, CAT | {"class_data_dir": "dogs"}], "class_data_dir dogs is given for 'a dog' and for 'a cat'"),
])  # fmt: skip
def test_what_is_refused(tmp_path, listed, message):
    with pytest.raises(ConfigError, match="concepts.json") as error:
        read_concepts(written(tmp_path, listed), 200, 40)
    assert message in str(error.value)


def test_one_class_of_two_subjects_is_drawn_once(tmp_path):
    other = CAT | {"class_data_dir": "./dogs", "class_prompt": "a dog", "num_class_images": 90}
    concepts = read_concepts(written(tmp_path, [DOG | {"num_class_images": 50}, CAT, other | {
        "instance_data_dir": "third"}]), 200, 40)  # fmt: skip
    classes, numbers = classes_of(concepts)
    assert numbers == [0, 1, 0] and [its.class_prompt for its in classes] == ["a dog", "a cat"]
    assert [its.num_class_images for its in classes] == [90, 200]


def test_options_take_the_subjects_of_the_file(files, tmp_path, capsys):
    for name in ("dog", "cat"):
        (tmp_path / name).mkdir()
    listed = [
        entry | {"instance_data_dir": str(tmp_path / entry["instance_data_dir"])} for entry in (DOG, CAT)
    ]
    path = written(tmp_path, listed)
    options = train(files, f"--concepts={path}")
    assert [its.instance_prompt for its in options.subjects] == ["a sks dog", "a zwx cat"]
    facts = options.training_facts()
    assert [its["class_prompt"] for its in facts["concepts"]] == ["a dog", "a cat"]
    assert "instance_prompt" not in facts and "num_class_images" not in facts
    assert train(files).training_facts()["concepts"] is None and len(train(files).subjects) == 1
    without = written(tmp_path, [{key: entry[key] for key in ("instance_data_dir", "instance_prompt")}
                                 for entry in listed])  # fmt: skip
    assert len(train(files, f"--concepts={without}", "--with_prior_preservation=False").subjects) == 2
    message = error_of(capsys, lambda: train(files, f"--concepts={without}"))
    assert "concepts.json: class_data_dir is missing: it is required with prior preservation" in message
    other = listed[1] | {"class_data_dir": listed[0]["instance_data_dir"]}
    slip = written(tmp_path, [listed[0], other])
    assert "lies in instance_data_dir" in error_of(capsys, lambda: train(files, f"--concepts={slip}"))
    gone = written(tmp_path, [DOG])
    assert "instance_data_dir dog: no such folder" in error_of(
        capsys, lambda: train(files, f"--concepts={gone}")
    )
